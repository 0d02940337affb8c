"""Loops, answer positions and the stage, on hand-written traces."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from neureasoner.data_builders.config import JudgeConfig, ProblemsConfig, RolloutsConfig
from neureasoner.data_builders.judges import ExactJudge, find_loop
from neureasoner.data_builders.judging import judge_traces
from neureasoner.data_builders.problem_file import build_problems, make_problems
from neureasoner.data_builders.rollouts import sample_rollouts
from neureasoner.errors import UserError
from neureasoner.responses import read_response
from neureasoner.sampler import Drawn
from neureasoner.traces import Problem, read_problems, read_traces, write_rows

QUESTION = "Use 3, 4 and 8, each exactly once, with + - * / to reach 20."
PROBLEM = Problem("c-1", "countdown", 1, QUESTION, "8 * 3 - 4")
A, B, C = (
    "Try 3 + 4 = 7, 7 + 8 = 15. Not 20.",
    "Now 8 - 4 = 4, 4 + 3 = 7. Not 20.",
    "Maybe 4 + 3 = 7, 7 + 8 = 15. Not 20.",
)
HIT = "Try 8 * 3 = 24, 24 - 4 = 20. That is 20."


def trace(tokenizer, paragraphs: list[str], answer: str = "Done. \\boxed{8 * 3 - 4}"):
    text = "\n\n".join(paragraphs) + "\n</think>\n\n" + answer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return read_response(tokenizer, [1], ids, [tokenizer.eos_token_id]).to_trace("c-1#0", PROBLEM)


def test_three_revisits_are_a_loop_and_two_are_not(tiny_tokenizer) -> None:
    labels = ExactJudge().judge(trace(tiny_tokenizer, [A, B, C, A, HIT]))
    assert not labels.inter.is_stagnant
    labels = ExactJudge().judge(trace(tiny_tokenizer, [A, B, C, A, B, HIT]))
    assert labels.inter.is_stagnant and labels.inter.steps == (2, 5) and labels.inter.attempts == [2, 3, 4]
    assert labels.inter.loop_detected_at == "Paragraph 3"
    assert labels.correct and not labels.intra.has_error


def test_a_finished_block_is_no_reasoning(tiny_tokenizer) -> None:
    block = '<INTRA>\n[FAILURE_INTRA] Off.\n- **error span**: "3 + 4 = 8"\n- **analysis**: 3 + 4 = 7.'
    labels = ExactJudge().judge(trace(tiny_tokenizer, [A, block, HIT]))
    assert not labels.intra.has_error


def test_first_wrong_step_has_its_span_and_the_answer_its_place(tiny_tokenizer) -> None:
    t = trace(tiny_tokenizer, [A, "Now 8 + 4 = 11, 11 + 3 = 14. Not 20.", HIT, "So that is the answer."])
    labels = ExactJudge().judge(t)
    assert labels.intra.error_type == "calculation" and labels.intra.step == 1
    a, b = labels.intra.span
    assert t.response[a:b] == labels.intra.first_error_step == "8 + 4 = 11"
    assert labels.answer_token == t.steps[2].token_end


@pytest.mark.parametrize(
    "family, question",
    [
        ("words", "Mia has 3 pens. Mia finds 2 more. How many pens does Mia have now?"),
        ("arithmetic", "Calculate 2 + 3."),
        ("countdown", QUESTION),
    ],
)
def test_numbers_too_long_to_read_are_no_crash(tiny_tokenizer, family, question) -> None:
    long = "7" * 5000
    said = f"Now {long} + 1 = {long}. Now it is {long}.\n\nBack to {long}. The answer is {long}."
    t = trace(tiny_tokenizer, [said, f"Written out: {long}. That gives {long}."], f"\\boxed{{{long}}}")
    t.problem = Problem("x", family, 1, question, "5")
    assert not ExactJudge().judge(t).correct


def test_an_unfinished_trace_is_wrong(tiny_tokenizer) -> None:
    t = trace(tiny_tokenizer, [HIT])
    t.finished = False
    assert not ExactJudge().judge(t).correct


def test_one_novel_step_does_not_break_a_loop_two_do() -> None:
    from neureasoner.data_builders.families import Review

    reviews = lambda keys: [Review(key=None if k is None else (k,)) for k in keys]  # noqa: E731
    assert find_loop(reviews(["a", "b", "a", "x", "b", "a"])) == (2, 6, [2, 4, 5])
    assert find_loop(reviews(["a", "b", "a", "x", "y", "b", "a"])) is None


def test_problem_files_are_graded_disjoint_and_checked(tmp_path: Path) -> None:
    build_problems(ProblemsConfig(out=str(tmp_path / "p"), n=45))
    problems = read_problems(tmp_path / "p/problems.jsonl")
    assert {(p.family, p.difficulty) for p in problems} == {
        (f, d) for f in ("arithmetic", "countdown", "words") for d in range(1, 6)
    }
    test = make_problems(["words", "countdown", "arithmetic"], 60, "test", 0)
    assert not {p.question for p in problems} & {p.question for p in test}
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "1", "family": "words", "difficulty": 1, "question": "q", "answer": "1"}\n{"id": 2}\n')
    with pytest.raises(UserError, match=r"bad.jsonl, line 2: key 'family' is missing"):
        read_problems(bad)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no problems"):
        read_problems(tmp_path / "empty.jsonl")


def test_promise_9_rollouts_resume_without_sampling_twice(
    tmp_path: Path, make_model, tiny_tokenizer, monkeypatch
) -> None:
    model = make_model("qwen3")
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    write_rows(tmp_path / "problems.jsonl", make_problems(["countdown"], 6, "train", 0))
    settings = {
        "model": str(tmp_path / "m"), "problems": str(tmp_path / "problems.jsonl"), "batch_size": 2,
        "max_new_tokens": 6, "seed": 5,
    }  # fmt: skip
    whole = RolloutsConfig(out=str(tmp_path / "whole"), **settings)
    sample_rollouts(whole)

    from neureasoner.data_builders import rollouts

    real, calls = rollouts._sample_part, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(rollouts, "_sample_part", killed)
    cut = RolloutsConfig(out=str(tmp_path / "cut"), **settings)
    with pytest.raises(KeyboardInterrupt):
        sample_rollouts(cut)
    assert not (tmp_path / "cut/traces.jsonl").exists()
    sample_rollouts(cut)
    assert len(calls) == 4  # one kept, one killed, two done on the second run
    assert [t.response_ids for t in read_traces(tmp_path / "cut/traces.jsonl")] == [
        t.response_ids for t in read_traces(tmp_path / "whole/traces.jsonl")
    ]
    summary = judge_traces(JudgeConfig(traces=str(tmp_path / "cut/traces.jsonl"), out=str(tmp_path / "j")))
    assert summary["n"] == 6 and summary["accuracy"] == 0


def test_a_stage_that_failed_before_it_wrote_anything_may_be_run_again(tmp_path: Path, tiny_tokenizer) -> None:
    file = tmp_path / "traces.jsonl"
    file.write_text("{broken\n")
    config = JudgeConfig(traces=str(file), out=str(tmp_path / "j"))
    with pytest.raises(UserError, match="line 1: not JSON"):
        judge_traces(config)
    write_rows(file, [trace(tiny_tokenizer, [A, HIT])])
    assert judge_traces(config)["n"] == 1
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        judge_traces(JudgeConfig(traces=str(file), out=str(tmp_path / "k")))


def test_a_question_no_family_can_read_is_refused_before_any_sampling(tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", [Problem("1", "words", 1, "What now?", "1")])
    with pytest.raises(UserError, match="not a story question"):
        sample_rollouts(RolloutsConfig(model="tiny", problems=str(tmp_path / "p.jsonl"), out=str(tmp_path / "r")))


def test_problems_of_any_other_family_are_answered_too(tmp_path: Path, make_model, tiny_tokenizer, monkeypatch) -> None:
    make_model("qwen3").save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    write_rows(tmp_path / "p.jsonl", [Problem(str(n), "gsm8k", 1, "How many?", str(n)) for n in (7, 8)])
    said = [*tiny_tokenizer("</think>\n\nSeven.\n#### 7").input_ids, tiny_tokenizer.eos_token_id]
    drawn = SimpleNamespace(rows=[Drawn(said, True), Drawn(said, True)])
    monkeypatch.setattr("neureasoner.sampler.sample", lambda *args, **how: drawn)
    config = RolloutsConfig(model=str(tmp_path / "m"), problems=str(tmp_path / "p.jsonl"), out=str(tmp_path / "r"))
    assert sample_rollouts(config) == {"n": 2, "accuracy": 0.5}


def test_recorded_sites_are_checked_first_and_then_written(tmp_path: Path, make_model, tiny_tokenizer) -> None:
    make_model("qwen3").save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    write_rows(tmp_path / "p.jsonl", make_problems(["words"], 2, "train", 0))
    settings = {"model": str(tmp_path / "m"), "problems": str(tmp_path / "p.jsonl"), "max_new_tokens": 5}
    with pytest.raises(UserError, match="layer 9"):
        sample_rollouts(RolloutsConfig(out=str(tmp_path / "a"), record=["residual:9"], **settings))
    assert not (tmp_path / "a/parts").exists()
    sample_rollouts(RolloutsConfig(out=str(tmp_path / "a"), record=["head:1[0,2]", "logits"], **settings))
    assert list((tmp_path / "a/records").iterdir())
