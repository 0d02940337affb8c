"""Rewards: right, wrong, cut off, tagged, thrown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neureasoner.data_builders.problem_file import make_problems
from neureasoner.errors import UserError
from neureasoner.traces import Problem
from neureasoner.training.rewards import check_gold, coin, given_answer, is_right, named, scored, verified

SUM = Problem("s", "arithmetic", 1, "Calculate 3 + 4 * 2.", "11")
ALGEBRA = Problem("a", "math", 1, "Halve one.", "\\frac{1}{2}")


@pytest.mark.parametrize(
    ("text", "finished", "reward"),
    [
        ("<think>\n\\boxed{99}\n</think>\n\nThe answer is \\boxed{11}.", True, 1.0),
        ("so 11\n</think>\n\nThe answer is \\boxed{11}.<|im_end|>", True, 1.0),
        ("so 11\n</think>\n\nThe answer is \\boxed{11}.", False, -1.0),  # cut off: wrong whatever it holds
        ("so 11\n</think>\n\nThe answer is \\boxed{12}.", True, -1.0),
        ("so 11\n</think>\n\nThe answer is 11.", True, -1.0),
        ("\\boxed{11}\n</think>\n\nDone.", True, -1.0),
        ("", True, -1.0),
    ],
)
def test_the_family_scorer_decides_and_a_truncated_answer_is_wrong(text: str, finished: bool, reward: float) -> None:
    assert verified()(SUM, text, finished) == reward


def test_countdown_accepts_any_right_expression() -> None:
    from neureasoner.data_builders.families import FAMILIES

    (problem,) = make_problems(["countdown"], 1, "train", 3)
    other = problem.answer
    assert is_right(problem, f"</think>\\boxed{{{other}}}", True)
    assert FAMILIES["countdown"].score(problem.question, problem.answer, other)
    assert not is_right(problem, "</think>\\boxed{1}", True)


def test_mathematical_equality_where_no_family_knows() -> None:
    assert is_right(ALGEBRA, "</think> It is \\boxed{0.5}.", True)
    assert not is_right(ALGEBRA, "</think> It is \\boxed{0.6}.", True)
    assert not is_right(ALGEBRA, "</think> It is 0.5.", True), "an answer must be marked"


def test_tagged_answers() -> None:
    text = "<answer>1</answer></think> <answer> 12 </answer> no, <answer>11</answer>"
    assert given_answer(SUM, text, "tagged") == "11"
    assert given_answer(SUM, "</think> \\boxed{11}", "tagged") is None
    assert given_answer(SUM, "<answer>11</answer></think>", "tagged") is None
    assert verified("tagged")(SUM, text, True) == 1.0 and verified("tagged")(SUM, text, False) == -1.0
    assert verified("boxed")(SUM, text, True) == -1.0


def test_the_coin_ignores_the_response() -> None:
    torch.manual_seed(3)
    reward = coin()
    values = [reward(SUM, "</think>\\boxed{11}", True) for _ in range(400)]
    assert set(values) == {1.0, -1.0} and abs(sum(values)) < 80
    torch.manual_seed(3)
    assert values == [reward(SUM, "", False) for _ in range(400)]


def test_a_reward_that_throws_or_gives_no_number_is_named() -> None:
    def broken(problem: Problem, response: str, finished: bool) -> float:
        raise ZeroDivisionError("of something")

    with pytest.raises(UserError, match=r"failed on problem 's': ZeroDivisionError: of something.*'Hm'"):
        scored(broken, [SUM], ["Hm"], [True])
    with pytest.raises(UserError, match="of problem 's' is nan"):
        scored(lambda *_: float("nan"), [SUM], ["Hm"], [True])
    with pytest.raises(UserError, match="failed on problem 's': TypeError"):
        scored(lambda *_: None, [SUM], ["Hm"], [True])  # type: ignore[arg-type,return-value]


def test_a_reward_of_ones_own_is_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reward.py").write_text(
        "NUMBER = 3\ndef f(problem, response, finished):\n    return len(response)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert named("own_reward:f")(SUM, "four", True) == 4.0
    assert named("verified")(SUM, "</think>\\boxed{11}", True) == 1.0
    with pytest.raises(UserError, match=r"own_reward:g cannot be imported \(AttributeError.*PYTHONPATH=\."):
        named("own_reward:g")
    with pytest.raises(UserError, match="nowhere_to_be_found:f cannot be imported"):
        named("nowhere_to_be_found:f")
    with pytest.raises(UserError, match="own_reward:NUMBER is no function"):
        named("own_reward:NUMBER")


def test_gold_that_would_not_be_rewarded_is_named() -> None:
    check_gold([SUM, *make_problems(["arithmetic", "countdown", "words"], 15, "train", 1)])
    check_gold([SUM], "tagged")
    with pytest.raises(UserError, match="problem 's': its own answer '12'"):
        check_gold([Problem("s", "arithmetic", 1, SUM.question, "12")])
