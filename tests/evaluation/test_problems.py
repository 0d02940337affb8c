"""Problem files: what no response could get right is named before a model is loaded; what is graded passes."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from neureasoner.artifacts import write_json
from neureasoner.data_builders.config import RolloutsConfig
from neureasoner.data_builders.grading.grade import answer_of, grade
from neureasoner.data_builders.problem_file import make_problems
from neureasoner.data_builders.rollouts import sample_rollouts
from neureasoner.errors import UserError
from neureasoner.evaluation.combination_config import CombineConfig
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.evaluate import evaluate
from neureasoner.evaluation.problems import check_golds, gradable_problems
from neureasoner.evaluation.reproduce.config import RuntimeConfig
from neureasoner.traces import Problem, write_rows

TWO = "Which?\n\n(A) one\n(B) two\n\nBox it."
UNANSWERABLE = [
    ("gsm8k", "2 + 2?", "", "the gold answer is empty"),
    ("gsm8k", "2 + 2?", "no idea", "'no idea' is not an answer that gsm8k can have"),
    ("math500", "2 + 2?", r"\boxed{}", "the gold answer is empty"),
    ("math500", "2 + 2?", r"\frac{1}{2", "unbalanced braces"),
    ("math500", "2 + 2?", "\x0crac{1}{2}", "control character"),
    ("aime24", "2 + 2?", "x" * 301, "a gold answer of 301 characters; at most 300"),
    ("math500", "2 + 2?", "so " * 100 + r"\boxed{4}", "a gold answer of 309 characters"),
    ("gpqa_diamond", TWO, "C", "'C' names none of the options A, B"),
    ("gpqa_diamond", TWO, "two", "'two' names none of the options A, B"),
    ("quiz", TWO, "(D)", "names none of the options A, B"),
    ("livecodebench", "Add.", "print(1)", "names no tests"),
    ("livecodebench", "Add.", "tests:abcdef", "the tests abcdef… of a code problem are not in"),
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``file(problem)``: a problem file with one good problem before it, of a benchmark 'quiz' with options."""
    monkeypatch.setenv("NEUREASONER_CACHE", str(tmp_path / "cache"))
    write_json(
        tmp_path / "stage.json", {"name": "evaluation benchmark", "summary": {"benchmark": "quiz", "kind": "option"}}
    )
    good = make_problems(["words"], 1, "test", 0)

    def make(problem: Problem) -> str:
        write_rows(tmp_path / "problems.jsonl", [*good, problem])
        return str(tmp_path / "problems.jsonl")

    return make


@pytest.mark.parametrize(("family", "question", "gold", "said"), UNANSWERABLE)
def test_a_gold_that_nothing_matches_is_named_before_a_model_is_loaded(
    file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, question: str, gold: str, said: str
) -> None:
    for name in ("load", "load_tokenizer"):
        monkeypatch.setattr(f"neureasoner.models.{name}", lambda *a, **k: pytest.fail("loaded"))
    name, out = file(Problem("bad one", family, 1, question, gold)), tmp_path / "out"
    for run in (
        lambda: evaluate(EvaluateConfig("tiny", name, str(out), arms=["vanilla"])),
        lambda: sample_rollouts(RolloutsConfig("tiny", name, str(out))),
    ):
        with pytest.raises(UserError, match=said) as e:
            run()
        assert f"{name}, problem 'bad one'" in str(e.value) and str(e.value).endswith("take the problem out")
        assert not out.exists()
    assert gradable_problems(name, 1), "nobody asks for the bad one"


@pytest.mark.parametrize(
    ("family", "question", "gold", "response"),
    [
        ("gsm8k", "?", "1,200", "#### 1200"),
        ("gsm8k", "?", "#### 18", r"\boxed{18}"),
        ("gsm8k", "?", "1/2", r"\boxed{0.5}"),
        ("aime24", "?", "033", r"\boxed{33}"),
        ("math500", "?", r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}"),
        ("math500", "?", r"\{1, 2\}", r"\boxed{\{2, 1\}}"),
        ("math500", "?", r"\text{Evelyn}", r"\boxed{Evelyn}"),
        ("math500", "?", "[2,5)", r"\boxed{[2,5)}"),
        ("math500", TWO, r"\text{(C)}", r"\boxed{C}"),
        ("gpqa_diamond", TWO, "B", r"\boxed{B}"),
        ("gpqa_diamond", TWO, "(A)", "The answer is A."),
        ("gpqa_diamond", "Which? A) one B) two", "C", r"\boxed{C}"),
        ("a corpus", TWO, "C", r"\boxed{C}"),
        ("a corpus", "?", "no idea", r"\boxed{no idea}"),
    ],
)
def test_what_is_graded_passes(tmp_path: Path, family: str, question: str, gold: str, response: str) -> None:
    problem = Problem("p", family, 1, question, gold)
    assert grade(problem, answer_of(problem, response, final_number=True)), "it is graded today"
    check_golds([problem], tmp_path / "problems.jsonl")


def test_the_generators_problems_pass_and_so_does_a_program(programs: Any, tmp_path: Path) -> None:
    check_golds(make_problems(["arithmetic", "countdown", "words"], 300, "test", 0), tmp_path / "p.jsonl")
    assert len(gradable_problems(programs[0])) == 1


@pytest.mark.parametrize("stage", ["evaluation.evaluate", "evaluation.combination", "evaluation.reproduce.runtime"])
@pytest.mark.parametrize(
    ("family", "asked", "cap"), [("words", 0, 512), ("gsm8k", 0, 16_000), ("gsm8k", 7, 7), ("words", 7, 7)]
)
def test_every_stage_has_the_cap_of_evaluate(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, family: str, asked: int, cap: int
) -> None:
    module = import_module(f"neureasoner.{stage}")
    name, config = {
        "evaluation.evaluate": ("evaluate", EvaluateConfig),
        "evaluation.combination": ("combine", CombineConfig),
        "evaluation.reproduce.runtime": ("runtime", RuntimeConfig),
    }[stage]
    [problem] = make_problems(["words"], 1, "test", 0)
    problem.family = family
    write_rows(tmp_path / "problems.jsonl", [problem])

    class Begun(Exception):
        pass

    def begin(out: str, name: str, settings: Any, **more: Any) -> None:
        raise Begun(settings.max_new_tokens)

    monkeypatch.setattr(module, "StageFolder", begin)
    settings = config(str(checkpoint / "model"), str(tmp_path / "problems.jsonl"), str(tmp_path / "out"))
    with pytest.raises(Begun, match=f"^{cap}$"):
        getattr(module, name)(replace(settings, max_new_tokens=asked))
    with pytest.raises(UserError, match="'max_new_tokens' must not be negative"):
        replace(settings, max_new_tokens=-1)
