"""The families against independent oracles: Python's own arithmetic, brute force, and injected mistakes."""

from __future__ import annotations

import itertools
import re
from random import Random

import pytest

from neureasoner.data_builders.corpus import draw, notes, split_of, traces
from neureasoner.data_builders.families import FAMILIES, extract_answer, family, score
from neureasoner.data_builders.families.base import EQUATION
from neureasoner.data_builders.judges import review_steps
from neureasoner.errors import UserError
from neureasoner.traces import Problem


def samples(name: str, n: int = 25):
    rng, f = Random(3), FAMILIES[name]
    for difficulty in range(1, f.levels + 1):
        for _ in range(n):
            yield difficulty, *f.generate(rng, difficulty)


def test_arithmetic_answers_equal_pythons() -> None:
    for _, question, answer in samples("arithmetic"):
        expression = question.removeprefix("Calculate ").removesuffix(".")
        assert re.fullmatch(r"[\d +*-]+", expression)
        assert int(answer) == eval(expression)  # only digits and operators, checked above


def test_countdown_answers_use_each_number_once_and_hit_the_target() -> None:
    for _, question, answer in samples("countdown"):
        numbers = [int(x) for x in re.findall(r"\d+", question)]
        *given, target = numbers
        assert sorted(map(int, re.findall(r"\d+", answer))) == sorted(given)
        assert eval(answer) == target


def test_countdown_solutions_equal_brute_force() -> None:
    f = FAMILIES["countdown"]
    task = f.parse("Use 3, 4 and 8, each exactly once, with + - * / to reach 20.")
    reached = set()
    for a, b, c in itertools.permutations(task.numbers):
        for o, p in itertools.product("+-*/", repeat=2):
            if eval(f"({a} {o} {b}) {p} {c}") == 20 and eval(f"{a} {o} {b}") == int(eval(f"{a} {o} {b}")) > 0:
                reached.add((a, o, b, p, c))
    found = {(x[0][0], x[0][1], x[0][2], x[1][1], x[1][2]) for x in f.solutions(task)}
    assert found and found <= reached


def test_word_answers_equal_a_second_reading() -> None:
    for _, question, answer in samples("words"):
        name = question.split()[0]
        value = 0
        for sentence in question.split(". ")[:-1]:
            n = [int(x) for x in re.findall(r"\d+", sentence)]
            if not sentence.startswith(name):
                continue
            if " has " in sentence:
                value = n[0]
            elif "finds" in sentence:
                value += n[0]
            elif "buys" in sentence:
                value += n[0] * n[1]
            elif "doubles" in sentence or "triples" in sentence:
                value *= 2 if "doubles" in sentence else 3
            else:
                value -= n[0]
        assert str(value) == answer, question


@pytest.mark.parametrize("name", list(FAMILIES))
def test_scorer_accepts_the_answer_and_refuses_others(name: str) -> None:
    for _, question, answer in samples(name, 5):
        problem = Problem("p", name, 1, question, answer)
        assert score(problem, answer)
        for wrong in (None, "", "abc", answer + "1", "__import__('os')"):
            assert not score(problem, wrong)


def test_corpus_holds_no_wrong_step_and_repeats_no_attempt() -> None:
    names = list(FAMILIES)
    for i, (question, response) in enumerate(traces(11, 600)):
        thinking, _, answer = response.partition("</think>")
        problem = Problem("p", names[i % 3], 1, question, "")
        assert score(problem, extract_answer("</think>" + answer))
        for a, op, b, c in EQUATION.findall(response):
            assert eval(f"{a} {op} {b}") == int(c)  # an oracle that knows nothing of the reviewers
        reviews = review_steps(problem, thinking.strip().split("\n\n"))
        assert not [r for r in reviews if r.error]
        keys = [r.key for r in reviews if r.key]
        assert len(keys) == len(set(keys))


def test_proofreading_says_nothing_wrong_but_what_it_quotes() -> None:
    n = 0
    for question, response in notes(5, 200):
        n += 1
        assert "<INTRA>" not in response and "<INTER>" not in response and "FAILURE" not in response
        kept = re.sub(r'error span\*\*: ".*"', "", response)
        kept = re.sub(r", not .*", "", kept)
        for a, op, b, c in EQUATION.findall(kept):
            assert eval(f"{a} {op} {b}") == int(c), (question, response)
    assert n > 120


def test_splits_share_no_question() -> None:
    rng = Random(0)
    for split in ("train", "validation", "test"):
        assert {split_of(draw(rng, "words", 1, split)[0]) for _ in range(20)} == {split}


@pytest.mark.parametrize(
    ("name", "question", "paragraphs", "errors"),
    [
        ("arithmetic", "Calculate 2 + 3 * 4.", ["3 * 4 = 13. Now I have 2 + 13.", "2 + 13 = 15. So the value is 15."],
         ["calculation", ""]),
        ("arithmetic", "Calculate 2 + 3 * 4.", ["2 + 3 = 5. Now I have 5 * 4."], ["logic_non_sequitur"]),
        ("arithmetic", "Calculate 2 + 3 * 4.", ["3 * 4 = 12. Now I have 7 + 12."], ["hallucination"]),
        ("arithmetic", "Calculate 2 + 3 * 4 + 5.", ["3 * 4 = 12. Now I have 2 + 12."], ["dropped_case"]),
        ("arithmetic", "Calculate 2 + 3 * 4.",
         ["3 * 4 = 13. Now I have 2 + 13.", "Back to 2 + 3 * 4. 3 * 4 = 12. Now I have 2 + 12."], ["calculation", ""]),
        ("countdown", "Use 3, 4 and 8, each exactly once, with + - * / to reach 20.",
         ["Try 3 + 4 = 7, 7 + 9 = 16. Not 20.", "Try 3 * 4 = 12, 12 + 8 = 20. Not 20.",
          "Try 8 * 3 = 24, 24 - 4 = 20. That is 20.", "Try 3 + 4 = 7, 8 + 8 = 16. Not 20."],
         ["hallucination", "logic_non_sequitur", "", "logic_non_sequitur"]),
        ("countdown", "Use 3, 4 and 8, each exactly once, with + - * / to reach 20.",
         ["Try 8 / 3 = 2, 2 + 4 = 6. Not 20.", "Try 8 * 3 = 24. That is 20."],
         ["domain_violation", "logic_non_sequitur"]),
        ("words", "Mia has 5 pens. Mia finds 3 more. Mia loses 2. How many pens does Mia have now?",
         ["Having fewer gives 5 - 2 = 3. Now it is 3."], ["dropped_case"]),
        ("words", "Mia has 5 pens. Mia finds 3 more. How many pens does Mia have now?",
         ["Finding more gives 5 + 4 = 9. Now it is 9."], ["hallucination"]),
    ],
)  # fmt: skip
def test_reviewers_find_planted_errors(name: str, question: str, paragraphs: list[str], errors: list[str]) -> None:
    f = family(name)
    assert [r.error for r in f.review(f.parse(question), paragraphs)] == errors


@pytest.mark.parametrize(
    ("name", "question", "paragraph", "error"),
    [
        ("arithmetic", "Calculate 2 + 3 * 4.", "So the answer is 14.", "dropped_case"),
        ("arithmetic", "Calculate 2 + 3 * 4.", "Slowly, 2 + 12: 2 + 10 = 12, 12 + 2 = 14. So it is 15.",
         "logic_non_sequitur"),
        ("countdown", "Use 3, 4 and 8, each exactly once, with + - * / to reach 20.",
         "Are all numbers used? 3, 4 and 9, each once. Yes.", "hallucination"),
        ("countdown", "Use 3, 4 and 8, each exactly once, with + - * / to reach 20.",
         "Written out: 8 * 3) - 4. That gives 20.", "domain_violation"),
        ("words", "Mia has 5 pens. Tom owns 7 cards. Mia finds 3 more. How many pens does Mia have now?",
         "The 9 things of the other one do not count.", "hallucination"),
    ],
)  # fmt: skip
def test_reviewers_check_conclusions_too(name: str, question: str, paragraph: str, error: str) -> None:
    f = family(name)
    assert [r.error for r in f.review(f.parse(question), [paragraph])] == [error]


def test_a_question_in_another_order_is_the_same_question() -> None:
    a = "Use 3, 4 and 8, each exactly once, with + - * / to reach 20."
    b = "Use 8, 3 and 4, each exactly once, with + - * / to reach 20."
    assert split_of(a) == split_of(b)


def test_unknown_family_and_foreign_question_are_refused() -> None:
    with pytest.raises(UserError, match="geometry"):
        family("geometry")
    with pytest.raises(UserError, match="not a countdown"):
        family("countdown").parse("What is 2 + 2?")


@pytest.mark.slow
def test_scorers_agree_with_reasoning_gym() -> None:
    gym = pytest.importorskip("reasoning_gym")
    theirs = gym.create_dataset("countdown", size=20, seed=1, min_numbers=3, max_numbers=4)
    for entry in theirs:
        numbers, target = entry["metadata"]["numbers"], entry["metadata"]["target"]
        question = (
            f"Use {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}, each exactly once, with + - * / "
            f"to reach {target}."
        )
        for given in (entry["answer"], entry["answer"] + " + 1", "1 + 1"):
            mine = family("countdown").score(question, "", given)
            assert mine == (theirs.score_answer(answer=given, entry=entry) == 1.0), given
    sums = gym.create_dataset("chain_sum", size=20, seed=1)
    for entry in sums:
        question = "Calculate " + re.search(r"[\d][\d +-]*[\d]", entry["question"])[0] + "."  # type: ignore[index]
        assert family("arithmetic").score(question, "", entry["answer"])
        assert not family("arithmetic").score(question, "", entry["answer"] + "1")
