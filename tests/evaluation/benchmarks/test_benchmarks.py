"""Benchmarks as problems: made-up rows of the shapes that the real files have; every way in which they can be wrong."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from neureasoner.commands import COMMANDS
from neureasoner.data_builders.grading.grade import answer_of, grade
from neureasoner.errors import UserError
from neureasoner.evaluation.benchmarks import load, suites
from neureasoner.evaluation.benchmarks.benchmark import benchmark
from neureasoner.evaluation.benchmarks.config import BenchmarkConfig
from neureasoner.evaluation.benchmarks.load import inline_options, load_problems
from neureasoner.evaluation.benchmarks.registry import BENCHMARKS, TEMPLATES
from neureasoner.evaluation.benchmarks.suites import Suite
from neureasoner.traces import Problem, read_problems

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "Ann has 1,000 pens and buys 234.", "answer": "She has <<1000+234=1234>>1234.\n#### 1,234"}],
    "math500": [
        {
            "problem": "Half of one?",
            "solution": "x",
            "answer": "\\frac{1}{2}",
            "subject": "Algebra",
            "level": 4,
            "unique_id": "test/algebra/1.json",
        }
    ],
    "aime24": [{"id": 60, "problem": "Find n.", "solution": "x", "answer": "033", "url": "u"}],
    "aime25": [{"problem": "Find m.", "answer": "70", "id": "0"}],
    "gpqa_diamond": [
        {
            "Question": f"Which fruit is number {i}?",
            "Correct Answer": f"fruit {i}\n",
            "Incorrect Answer 1": "stone",
            "Incorrect Answer 2": "iron",
            "Incorrect Answer 3": "glass",
            "Record ID": f"rec{i}",
        }
        for i in range(40)
    ],
    "livecodebench": [
        {
            "question_title": "plus one",
            "question_content": "Read n, print n + 1.",
            "platform": "atcoder",
            "question_id": "abc1_a",
            "starter_code": "",
            "difficulty": "medium",
            "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
            # LiveCodeBench ships its hidden tests as a pickle of one string; written here, never loaded
            "private_test_cases": base64.b64encode(
                zlib.compress(pickle.dumps(json.dumps([{"input": "41\n", "output": "42\n", "testtype": "stdin"}])))
            ).decode(),
            "metadata": "{}",
        },
        {
            "question_content": "Add two numbers.",
            "question_id": "3001",
            "starter_code": "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        ",
            "difficulty": "hard",
            "public_test_cases": json.dumps([{"input": "1\n[2, 3]", "output": "6", "testtype": "functional"}]),
            "private_test_cases": json.dumps([{"input": "0\n[]", "output": "0", "testtype": "functional"}]),
            "metadata": json.dumps({"func_name": "add"}),
        },
    ],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEUREASONER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tests"


def write(tmp_path: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    text = "".join(json.dumps(r) + "\n" for r in rows)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def problems(tmp_path: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> list[Problem]:
    return load_problems(BenchmarkConfig(name, str(tmp_path / "out"), write(tmp_path, rows), **settings))


RESPONSES = {
    "gsm8k": ("Let me see.\n</think>\n\nShe has \\boxed{1234} pens.", "\\boxed{1235}"),
    "math500": ("</think> \\boxed{0.5}", "\\boxed{2}"),
    "aime24": ("\\boxed{33}", "\\boxed{34}"),
    "aime25": ("\\boxed{70}", "70"),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_math_benchmarks_become_problems_that_grade(name: str, tmp_path: Path) -> None:
    [problem] = problems(tmp_path, name, ROWS[name])
    assert problem.family == name
    assert problem.question.endswith("put your final answer within \\boxed{}.")
    right, wrong = RESPONSES[name]
    assert grade(problem, answer_of(problem, right)) is True
    assert grade(problem, answer_of(problem, wrong)) is False


def test_ids_and_difficulties_come_from_the_rows(tmp_path: Path) -> None:
    assert [p.id for p in problems(tmp_path, "math500", ROWS["math500"])] == ["math500/test/algebra/1.json"]
    assert problems(tmp_path, "math500", ROWS["math500"])[0].difficulty == 4
    assert [p.id for p in problems(tmp_path, "gsm8k", ROWS["gsm8k"] * 2)] == ["gsm8k/0", "gsm8k/1"]
    assert [p.difficulty for p in problems(tmp_path, "livecodebench", ROWS["livecodebench"])] == [2, 3]


def shown(problem: Problem) -> dict[str, str]:
    return dict(re.findall(r"^\(([A-J])\) (.*)$", problem.question, re.MULTILINE))


def test_options_are_shuffled_the_same_way_every_time(tmp_path: Path) -> None:
    rows = ROWS["gpqa_diamond"]
    first = problems(tmp_path, "gpqa_diamond", rows)
    for i, p in enumerate(first):
        assert shown(p)[p.answer] == f"fruit {i}"
        assert sorted(shown(p).values()) == sorted([f"fruit {i}", "stone", "iron", "glass"])
    assert first == problems(tmp_path, "gpqa_diamond", rows)
    counts = Counter(p.answer for p in first)
    assert set(counts) == set("ABCD") and max(counts.values()) < 20
    assert [p.answer for p in first] != [p.answer for p in problems(tmp_path, "gpqa_diamond", rows, seed=1)]
    alone = problems(tmp_path, "gpqa_diamond", rows[7:8])[0]  # an item's order does not depend on its neighbours
    assert (alone.answer, alone.question) == (first[7].answer, first[7].question)


def test_options_in_every_form_give_the_same_problem(tmp_path: Path) -> None:
    own = {"kind": "option"}
    texts = ["red", "green", "blue"]
    forms = [
        ({"question": "Sky?", "a": "red", "b": "green", "c": "blue", "answer": "C"}, {"options": "a+b+c"}),
        ({"question": "Sky?", "choices": texts, "answer": 2}, {"options": "choices"}),
        (
            {"question": "Sky?", "choices": {"text": texts, "label": ["A", "B", "C"]}, "answer": "blue"},
            {"options": "choices"},
        ),
        ({"question": "Sky? A) red, B) green, C) blue", "answer": "C"}, {}),
        ({"question": "Sky?\n(A) red\n(B) green\n(C) blue\n", "answer": "C"}, {}),
    ]
    seen = set()
    for row, options in forms:
        columns = {"question": "question", "answer": "answer", **options}
        [problem] = problems(tmp_path, "colours", [row], columns=columns, **own)
        seen.add((problem.question, problem.answer))
    assert len(seen) == 1


def test_inline_options_are_the_last_run_of_letters() -> None:
    assert inline_options("Compounds A) x and B) y react. Which? A) 1 B) 2 C) f(B) 3") == (
        "Compounds A) x and B) y react. Which?",
        ["1", "2", "f(B) 3"],
    )
    assert inline_options("No options here. Vitamin A. and so on") is None


def test_what_a_question_holds_is_never_a_place_of_the_template(tmp_path: Path) -> None:
    row = {"question": "Is {options} or {question} or {0} a set? \\boxed{}", "answer": "1"}
    [problem] = problems(tmp_path, "gsm8k", [row])
    assert problem.question == TEMPLATES["math"].replace("{question}", row["question"])


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "ask.txt"
    path.write_text("Q: {question}\nA:")
    [problem] = problems(tmp_path, "gsm8k", ROWS["gsm8k"], template=str(path))
    assert problem.question == "Q: Ann has 1,000 pens and buys 234.\nA:"
    path.write_text("Q: ")
    with pytest.raises(UserError, match=r"a template needs \{question\}"):
        problems(tmp_path, "gsm8k", ROWS["gsm8k"], template=str(path))
    with pytest.raises(UserError, match="no such file \\(key 'template'\\)"):
        problems(tmp_path, "gsm8k", ROWS["gsm8k"], template=str(tmp_path / "none"))


def test_code_becomes_a_name_of_its_tests(tmp_path: Path, cache: Path) -> None:
    stdin, function = problems(tmp_path, "livecodebench", ROWS["livecodebench"])
    assert suites.find(stdin.answer) == Suite((("1\n", "2\n"), ("41\n", "42\n")))
    assert suites.find(function.answer) == Suite((("1\n[2, 3]", "6"), ("0\n[]", "0")), "add")
    assert "reads the input from stdin" in stdin.question
    assert "def add(self, a: int, b: List[int]) -> int:" in function.question
    assert "42" not in stdin.question + stdin.answer.replace(stdin.answer[6:], "")
    assert len(list(cache.iterdir())) == 2
    assert problems(tmp_path, "livecodebench", ROWS["livecodebench"])[0].answer == stdin.answer


def test_programs_are_graded_through_the_common_door(tmp_path: Path) -> None:
    stdin, function = problems(tmp_path, "livecodebench", ROWS["livecodebench"])
    right = "Thinking: ```python\nprint(0)\n```</think>\nHere:\n```python\nprint(int(input()) + 1)\n```\nDone."
    assert answer_of(stdin, right) == "print(int(input()) + 1)\n"
    assert grade(stdin, answer_of(stdin, right)) is True
    assert grade(stdin, "print(2)") is False  # right on the public test only
    assert answer_of(stdin, "print(2)") is None and grade(stdin, None) is False
    solution = (
        "```python\nclass Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        return a + sum(b)\n```"
    )
    assert grade(function, answer_of(function, solution)) is True
    assert grade(function, "class Solution:\n    def add(self, a, b):\n        return 6") is False


def test_a_test_set_that_is_missing_or_damaged_is_named(tmp_path: Path, cache: Path) -> None:
    stdin = problems(tmp_path, "livecodebench", ROWS["livecodebench"])[0]
    [path] = [p for p in cache.iterdir() if p.name == stdin.answer.removeprefix("tests:")]
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="damaged"):
        grade(stdin, "print(1)")
    path.unlink()
    with pytest.raises(UserError, match="evaluation benchmark` on this machine too"):
        grade(stdin, "print(1)")


class Evil:
    def __reduce__(self) -> Any:
        return print, ("pickle was run",)


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        # pickles are written here to see that they are refused; nothing loads one
        (base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode(), "a pickle of several strings"),
        (base64.b64encode(zlib.compress(pickle.dumps(["[]"]))).decode(), "does more than hold one string"),
        (base64.b64encode(zlib.compress(b"\x80\x04X\xff\x00\x00\x00abc")).decode(), "only 3 remain"),
        ("not base64 at all!", "cannot be read"),
        ('"text"', "expected a list of tests, got str"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_tests_that_cannot_be_read_are_refused_and_no_pickle_is_loaded(
    cell: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {**ROWS["livecodebench"][0], "private_test_cases": cell}
    with pytest.raises(UserError, match=re.escape(why)) as caught:
        problems(tmp_path, "livecodebench", [row])
    assert "livecodebench: rows.jsonl, row 1" in str(caught.value)
    assert "pickle was run" not in capsys.readouterr().out


def test_a_bomb_of_tests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "MAX_TESTS", 1 << 20)
    bomb = base64.b64encode(zlib.compress(bytes(64 << 20))).decode()
    with pytest.raises(UserError, match="unpacks to more than 1 MiB"):
        problems(tmp_path, "livecodebench", [{**ROWS["livecodebench"][0], "private_test_cases": bomb}])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gsm8k", {"answer": "no number"}, "unanswerable: 'no number' is not an answer that gsm8k can have"),
        ("gsm8k", {"answer": None}, "unanswerable: the gold answer is empty"),
        ("gsm8k", {"question": " "}, "the question is empty"),
        ("gsm8k", {"answer": "#### 18 or 19"}, "'18 or 19' is not an answer that gsm8k can have"),
        ("math500", {"answer": "\\frac{1}{"}, "the gold answer '\\frac{1}{' has unbalanced braces"),
        ("math500", {"answer": "1}{"}, "the gold answer '1}{' has unbalanced braces"),
        ("math500", {"answer": "so \\boxed{5"}, "the gold answer 'so \\boxed{5' has unbalanced braces"),
        ("math500", {"answer": "\\boxed{}"}, "the gold answer is empty ('\\boxed{}')"),
        ("math500", {"answer": "\\boxed{\\text{ }}"}, "the gold answer is empty"),
        ("math500", {"answer": "so \\boxed{ }."}, "the gold answer is empty"),
        ("math500", {"answer": "$$"}, "the gold answer is empty ('$$')"),
        ("math500", {"answer": "\frac{1}{2}"}, "the gold answer '\\x0crac{1}{2}' holds a control character"),
        ("aime24", {"answer": "1000"}, "'1000' is not an answer that aime24 can have"),
        ("aime25", {"answer": "-3"}, "is not an answer that aime25"),
        ("math500", {"answer": "None"}, "the gold answer is empty"),
        ("math500", {"answer": "x" * 1000}, "a gold answer of 1000 characters"),
        (
            "livecodebench",
            {"public_test_cases": "[]", "private_test_cases": "[]"},
            "no tests, so no program can be graded",
        ),
        ("livecodebench", {"public_test_cases": '[{"input": "1"}]'}, "test 1 has no input or no output"),
        ("livecodebench", {"metadata": '{"func_name": "f"}', "public_test_cases": '[["x", "1"]]'}, "not JSON"),
        ("livecodebench", {"metadata": "{"}, "the function's column is not JSON"),
    ],
)
def test_a_row_that_cannot_be_graded_is_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [ROWS[name][0], {**ROWS[name][0], "id": "7", "unique_id": "7", "question_id": "7", **change}]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        problems(tmp_path, name, rows)
    assert f"{name}: rows.jsonl, row 2" in str(caught.value)
    if "gold" in message or "answer" in message:
        assert f"{name}: rows.jsonl, row 2, column 'answer': unanswerable: " in str(caught.value)


@pytest.mark.parametrize(("gold", "kept"), [
    ("\\{1, 2\\}", "\\{1, 2\\}"), ("\\left\\{ x \\right.", "\\left\\{ x \\right."), ("(1,2]", "(1,2]"),
    ("\\$36", "\\$36"), ("Empty \\boxed{} at first.\n#### 5", "5"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
])  # fmt: skip
def test_golds_that_can_be_matched_are_kept(gold: str, kept: str, tmp_path: Path) -> None:
    [problem] = problems(tmp_path, "math500", [{**ROWS["math500"][0], "answer": gold}])
    assert problem.answer == kept
    assert grade(problem, answer_of(problem, f"\\boxed{{{kept}}}"))


@pytest.mark.parametrize("kind", ["math", "option", "columns", "id"])
def test_no_control_character_of_a_row_acts_on_the_terminal(kind: str, tmp_path: Path) -> None:
    evil = "\x1b[2J\x07\u061c\u202e\x9bx\ud800\r\n"
    row: dict[str, Any] = {"question": "Sky? A) red B) blue", "answer": evil + "5"}
    columns: dict[str, str] = {}
    if kind == "columns":
        row = {"question": "Sky?", evil + "answer": "5"}
    if kind == "id":
        row, columns = {**row, "answer": "5", "id": evil}, {"question": "question", "answer": "answer", "id": "id"}
    with pytest.raises(UserError) as caught:
        problems(tmp_path, "sky", [row] * 2, kind="option" if kind == "option" else "math", columns=columns)
    message = str(caught.value)
    assert message.isprintable() and "\\x1b[2J\\x07\\u061c\\u202e\\x9bx\\ud800" in message


def test_a_gold_that_names_no_option_is_named(tmp_path: Path) -> None:
    row = {"question": "Sky? A) red B) blue", "answer": "E"}
    with pytest.raises(
        UserError, match="row 1, column 'answer': unanswerable: the gold answer 'E' names none of 2 options"
    ):
        problems(tmp_path, "sky", [row], kind="option")
    with pytest.raises(UserError, match="no options; name their columns"):
        problems(tmp_path, "sky", [{"question": "Sky?", "answer": "A"}], kind="option")


def test_wrong_columns_are_named_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        problems(tmp_path, "math500", [{"problm": "x", "answer": "1"}])
    message = str(caught.value)
    assert "no column 'problem' for the question; did you mean 'problm'?; found problm, answer" in message
    assert "--columns question=COLUMN" in message
    [problem] = problems(
        tmp_path, "math500", [{"problm": "x", "gold": 3.0}], columns={"question": "problm", "answer": "gold"}
    )
    assert problem.answer == "3"
    joined = problems(
        tmp_path,
        "svamp",
        [{"B": "Two.", "Q": "How many?", "A": 2}],
        kind="math",
        columns={"question": "B+Q", "answer": "A"},
    )
    assert joined[0].question.startswith("Two. How many?\n")


def test_settings_that_cannot_be_are_named(tmp_path: Path) -> None:
    config = lambda name, **k: BenchmarkConfig(name, str(tmp_path / "out"), **k)  # noqa: E731
    for make, message in [
        (
            lambda: config(
                "gsm8",
            ),
            "unknown benchmark 'gsm8'; did you mean 'gsm8k'?",
        ),
        (lambda: config("mine", kind="math"), "benchmark 'mine' needs 'input'"),
        (lambda: config("words", kind="math", input="x.jsonl"), "is that of an embedded problem family"),
        (lambda: config("gsm8k", release="release_v1"), "benchmark gsm8k has no releases"),
        (lambda: config("livecodebench", release="v9"), "unknown release 'v9'; known: release_v1"),
        (lambda: config("gsm8k", input=str(tmp_path / "none.jsonl")), "no such file or folder"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            load_problems(make())
    for settings, message in [
        ({"kind": "essay"}, "'kind' must be one of math, option, code"),
        ({"columns": {"gold": "x"}}, "unknown role 'gold'"),
        ({"limit": -1}, "'limit' must not be negative"),
    ]:
        with pytest.raises(UserError, match=message):
            config("gsm8k", **settings)
    with pytest.raises(UserError, match="key 'name' is empty"):
        config("")
    with pytest.raises(UserError, match="id 'aime24/60' occurs twice"):
        problems(tmp_path, "aime24", ROWS["aime24"] * 2)
    with pytest.raises(UserError, match="holds no rows"):
        problems(tmp_path, "gsm8k", [])
    (tmp_path / "rows.jsonl").write_text('{"question": "x"\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, row 1: not JSON"):
        load_problems(config("gsm8k", input=str(tmp_path / "rows.jsonl")))


def test_the_hub_is_asked_for_what_the_registry_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked: list[Any] = []

    class Rows(list):  # type: ignore[type-arg]
        def skip(self, n: int) -> Any:
            return self[n:]

    def load_dataset(*args: Any, **settings: Any) -> Rows:
        asked.append((*args, settings["split"], settings["revision"]))
        return Rows(next(rows for name, rows in ROWS.items() if BENCHMARKS[name].hub == args[0]))

    def download(repository: str, name: str, **settings: Any) -> str:
        asked.append((repository, name, settings["repo_type"]))
        return write(tmp_path, [{**ROWS["livecodebench"][0], "question_id": name}], f"hub-{name}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in ("gsm8k", "math500", "aime24", "aime25", "gpqa_diamond"):
        assert load_problems(BenchmarkConfig(name, "out", revision="abc", limit=1))
    assert asked == [
        ("openai/gsm8k", "main", "test", "abc"),
        ("HuggingFaceH4/MATH-500", None, "test", "abc"),
        ("HuggingFaceH4/aime_2024", None, "train", "abc"),
        ("math-ai/aime25", None, "test", "abc"),
        ("Idavidrein/gpqa", "gpqa_diamond", "train", "abc"),
    ]
    asked.clear()
    assert len(load_problems(BenchmarkConfig("livecodebench", "out", release="release_v3"))) == 3
    hub = "livecodebench/code_generation_lite"
    assert asked == [(hub, f, "dataset") for f in ("test.jsonl", "test2.jsonl", "test3.jsonl")]


def test_a_benchmark_that_the_hub_does_not_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    for name in ("aime25", "livecodebench"):
        with pytest.raises(UserError, match=r"reach the Hub\. Have a local copy\? Name it with --input FILE"):
            load_problems(BenchmarkConfig(name, "out"))


def test_the_stage_writes_a_problem_file_and_states_where_it_is_from(tmp_path: Path) -> None:
    source = write(tmp_path, ROWS["gpqa_diamond"], "rows.jsonl.gz")
    config = BenchmarkConfig("gpqa_diamond", str(tmp_path / "gpqa"), source, seed=3)
    summary = benchmark(config)
    assert (summary["n"], summary["whole_set"], summary["options_seed"], summary["kind"]) == (40, 198, 3, "option")
    assert "no item be shown" in summary["private"] and "{options}" in summary["template"]
    assert read_problems(tmp_path / "gpqa" / "problems.jsonl") == load_problems(config)
    assert benchmark(config) == summary
    code = BenchmarkConfig("livecodebench", str(tmp_path / "lcb"), write(tmp_path, ROWS["livecodebench"]))
    assert benchmark(code)["release"] == "unstated"
    assert COMMANDS["evaluation benchmark"].load() is benchmark
    assert COMMANDS["evaluation benchmark"].config_class() is BenchmarkConfig


def test_own_code_benchmark_from_a_file(tmp_path: Path) -> None:
    row = {"question": "Double it.", "tests": [["1", "2"], {"input": "3", "output": "6"}]}
    [problem] = problems(tmp_path, "mine", [row], kind="code", columns={"question": "question", "tests": "tests"})
    assert suites.find(problem.answer) == Suite((("1", "2"), ("3", "6")))
    with pytest.raises(UserError, match="no column 'tests' for the tests"):
        problems(tmp_path, "mine", [{"question": "x"}], kind="code")


def test_every_benchmark_states_its_template_and_its_source() -> None:
    for name, b in BENCHMARKS.items():
        assert b.name == name and b.hub and "{question}" in b.ask
        assert load.benchmark_of(BenchmarkConfig(name, "out")) == b or b.kind == "code"
