"""Countdown: reach a target from given numbers, each used exactly once. The family where one can run in circles.

An attempt is a left-deep chain: combine two numbers, then the result with a third, and so on.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from random import Random

from neureasoner.data_builders.families.base import (
    Equation,
    Narration,
    Review,
    calculate,
    equations,
    pick_checks,
    write_equation,
    wrong_equation,
)
from neureasoner.errors import UserError

QUESTION = re.compile(r"Use ([\d, ]+?) and (\d+), each exactly once, with \+ - \* / to reach (\d+)\.")
# (how many numbers, largest number, operators of the hidden solution)
GRADES = [(3, 25, "+-"), (3, 15, "+-*"), (3, 20, "+-*/"), (4, 9, "+-*"), (4, 12, "+-*/")]
LARGEST = 999
# In a narration each attempt is the last but for chance MISS: the same at every attempt, so that how long a search has
# lasted says nothing about its end, and a reader of such texts has no reason to claim a hit because one is due. With
# four numbers a search is longer; the most keeps it below 512 tokens.
MISS, MOST_MISSES = {3: 0.88, 4: 0.9}, {3: 8, 4: 11}

Chain = tuple[tuple[int, str, int], ...]


@dataclass(frozen=True)
class Target:
    numbers: tuple[int, ...]
    target: int


def attempt_key(chain: Chain | list[tuple[int, str, int]]) -> tuple[tuple[int, str, int], ...]:
    """Identity of an attempt: its operations, whatever their order and whatever side a number stands on."""
    return tuple(sorted((min(a, b), o, max(a, b)) if o in "+*" else (a, o, b) for a, o, b in chain))


def write_chain(chain: Chain) -> str:
    return ", ".join(write_equation(*step) for step in chain)


def result(chain: Chain) -> int:
    a, o, b = chain[-1]
    return int(calculate(a, o, b) or 0)


def formula(chain: Chain) -> str:
    """The chain as one expression with the brackets it needs."""
    text = f"{chain[0][0]} {chain[0][1]} {chain[0][2]}"
    last = chain[0][1]
    for _, op, b in chain[1:]:
        if op in "*/" and last in "+-":
            text = f"({text})"
        text, last = f"{text} {op} {b}", op
    return text


def evaluate(text: str) -> tuple[float, list[int]] | None:
    """Value and numbers of an expression of ``+ - * /`` and whole numbers; None for anything else. No ``eval``."""
    numbers: list[int] = []

    def walk(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
            a, b = walk(node.left), walk(node.right)
            if isinstance(node.op, ast.Add):
                return a + b
            if isinstance(node.op, ast.Sub):
                return a - b
            return a * b if isinstance(node.op, ast.Mult) else a / b
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return node.value
        raise ValueError

    if len(text) > 200:
        return None
    try:
        return walk(ast.parse(text.strip(), mode="eval").body), numbers
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


class Countdown:
    name = "countdown"
    levels = len(GRADES)

    def generate(self, rng: Random, difficulty: int) -> tuple[str, str]:
        n, top, ops = GRADES[difficulty - 1]
        while True:
            numbers = [rng.randint(2, top) for _ in range(n)]
            chain = self._random_chain(rng, numbers, ops)
            if chain is None or not 10 <= result(chain) <= 150 or result(chain) in numbers:
                continue
            shown = numbers[:]
            rng.shuffle(shown)
            listed = ", ".join(map(str, shown[:-1])) + f" and {shown[-1]}"
            question = f"Use {listed}, each exactly once, with + - * / to reach {result(chain)}."
            return question, formula(chain)

    @staticmethod
    def _random_chain(rng: Random, numbers: list[int], ops: str, target: int | None = None) -> Chain | None:
        """A random legal chain. With a target the last operation is the one that comes nearest to it."""
        left = list(numbers)
        rng.shuffle(left)
        value, chain = left.pop(), []
        while left:
            b = left.pop()
            choices = []
            for o in ops:
                c = calculate(value, o, b)
                if c is not None and 0 < c <= LARGEST and not (o == "/" and b == 1):
                    choices.append((o, c))
            if not choices:
                return None
            if target is not None and not left:
                o, c = min(choices, key=lambda oc: abs(oc[1] - target))
            else:
                o, c = rng.choice(choices)
            chain.append((value, o, b))
            value = c
        return tuple(chain)

    def parse(self, question: str) -> Target:
        m = QUESTION.search(question)
        if not m:
            raise UserError(f"not a countdown question (expected 'Use 2, 3 and 4, each exactly once, …'): {question!r}")
        return Target((*(int(x) for x in m[1].split(",")), int(m[2])), int(m[3]))

    def score(self, question: str, answer: str, given: str) -> bool:
        task, found = self.parse(question), evaluate(given)
        return found is not None and abs(found[0] - task.target) < 1e-9 and sorted(found[1]) == sorted(task.numbers)

    def solutions(self, task: Target) -> list[Chain]:
        """Every left-deep chain that reaches the target (duplicates by attempt key removed)."""
        out: dict[tuple[tuple[int, str, int], ...], Chain] = {}

        def go(value: int, left: tuple[int, ...], chain: Chain) -> None:
            if not left:
                if value == task.target:
                    out.setdefault(attempt_key(chain), chain)
                return
            for i, b in enumerate(left):
                for o in "+-*/":
                    c = calculate(value, o, b)
                    if c is not None and 0 < c <= LARGEST:
                        go(c, left[:i] + left[i + 1 :], (*chain, (value, o, b)))

        for i, a in enumerate(task.numbers):
            go(a, task.numbers[:i] + task.numbers[i + 1 :], ())
        return sorted(out.values())

    def failed_attempts(self, task: Target, rng: Random, n: int, avoid: set[object] | None = None) -> list[Chain]:
        """Up to n different chains that miss the target."""
        seen: set[object] = set(avoid or ())
        out: list[Chain] = []
        for _ in range(20 * n):
            if len(out) == n:
                break
            chain = self._random_chain(rng, list(task.numbers), "+-*/", task.target)
            if chain is None or result(chain) == task.target or attempt_key(chain) in seen:
                continue
            seen.add(attempt_key(chain))
            out.append(chain)
        return out

    def narrate(self, task: Target, rng: Random) -> Narration:
        n = len(task.numbers)
        misses = 0
        while misses < MOST_MISSES[n] and rng.random() < MISS[n]:
            misses += 1
        listed = ", ".join(map(str, task.numbers[:-1])) + f" and {task.numbers[-1]}"
        out = [rng.choice([f"I have {listed} and want {task.target}.", f"The goal is {task.target} from {listed}."])]
        openers = ["Try", "Maybe", "What about", "Next", "Now"]
        opened: set[Chain] = set()
        solved = {attempt_key([step]) for s in self.solutions(task) for step in s[:1]}
        for chain in self.failed_attempts(task, rng, misses):
            first = attempt_key([chain[0]])
            if n > 3 and rng.random() < 0.2 and first not in solved and first not in opened:
                opened.add(first)
                rest = f"{chain[0][0]} {chain[0][1]} {chain[0][2]} leads nowhere"
                out.append(f"{rng.choice(openers)} {write_equation(*chain[0])}. I think {rest}, I drop it.")
            else:
                out.append(self.write_attempt(task, chain, rng.choice(openers)))
        chain = rng.choice(self.solutions(task))
        out.append(self.write_attempt(task, chain, rng.choice(openers)))
        for kind in pick_checks(rng, ["back", "used", "written"]):
            out.append(self._check(kind, task, chain))
        out.append(rng.choice(["I am sure now. That is the answer.", "So that is the answer."]))
        return Narration(out, f"{write_chain(chain)}. The answer is \\boxed{{{formula(chain)}}}.")

    @staticmethod
    def write_attempt(task: Target, chain: Chain, opener: str) -> str:
        verdict = f"That is {task.target}." if result(chain) == task.target else f"Not {task.target}."
        return f"{opener} {write_chain(chain)}. {verdict}"

    @staticmethod
    def _check(kind: str, task: Target, chain: Chain) -> str:
        if kind == "used":
            listed = ", ".join(map(str, task.numbers[:-1])) + f" and {task.numbers[-1]}"
            return f"Are all numbers used? {listed}, each once. Yes."
        if kind == "written":
            return f"Written out: {formula(chain)}. That gives {task.target}."
        inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}
        lines, at = [], task.target
        for _, o, b in reversed(chain):
            lines.append(write_equation(at, inverse[o], b))
            at = int(calculate(at, inverse[o], b) or 0)
        return f"Going back from {task.target}: " + ", ".join(lines) + ". It fits."

    def review(self, task: Target, paragraphs: list[str]) -> list[Review]:
        out, known = [], {*task.numbers, task.target}
        for text in paragraphs:
            eqs, r = equations(text), Review()
            if text.startswith(("Going back", "Work back")):
                r.key = ("check", text.split()[0], *(q.text for q in eqs))
                for q in eqs:
                    bad = wrong_equation(q, known)
                    if bad and not r.error:
                        r.error, r.quote, r.why = bad.error, bad.quote, bad.why
                    known.add(q.c)
            elif text.startswith("Are all numbers"):
                r.key = ("check", "used")
                listed = [int(n) for n in re.findall(r"\d+", text)]
                if sorted(listed) != sorted(task.numbers):
                    r.error, r.quote, r.why = "hallucination", text, "these are not the given numbers"
            elif text.startswith("Written out"):
                r.key = ("check", "written", text)
                self._written(text, task, r)
            elif eqs:
                self._attempt(text, eqs, task, r)
                known.update(q.c for q in eqs)
            out.append(r)
        return out

    @staticmethod
    def _written(text: str, task: Target, r: Review) -> None:
        m = re.search(r"Written out: (.+?)\. That gives (\d+)\.", text)
        found = evaluate(m[1]) if m else None
        if m and found is None:
            r.error, r.quote, r.why = "domain_violation", m[1], "this is no expression"
        elif m and int(m[2]) != task.target:
            r.error, r.quote, r.why = "hallucination", m[2], f"the target is {task.target}"
        elif m and found and abs(found[0] - int(m[2])) > 1e-9:
            r.error, r.quote, r.why = "calculation", m[1], f"{m[1]} is {found[0]:g}"
        elif m and found and sorted(found[1]) != sorted(task.numbers):
            r.error, r.quote, r.why = "hallucination", m[1], "these are not the given numbers"

    @staticmethod
    def _attempt(text: str, eqs: list[Equation], task: Target, r: Review) -> None:
        # The last value belongs to the identity: a miscalculated attempt done again and right is no revisit.
        r.key = ("attempt", attempt_key([(q.a, q.op, q.b) for q in eqs]), eqs[-1].c)
        left, value = list(task.numbers), None
        for i, q in enumerate(eqs):
            bad = wrong_equation(q, None)
            if bad and not r.error:
                r.error, r.quote, r.why = bad.error, bad.quote, bad.why
            for n in (q.a, q.b) if i == 0 else (q.b,):
                if n in left:
                    left.remove(n)
                elif not r.error:
                    r.error, r.quote, r.why = "hallucination", q.text, f"{n} is not one of the numbers left"
            if i and q.a != value and not r.error:
                r.error, r.quote, r.why = "logic_non_sequitur", q.text, f"it should go on from {value}"
            value = q.c
        r.result = value
        hit = re.search(r"That is (\d+)\.", text)
        miss = re.search(r"Not (\d+)\.", text)
        if hit and not r.error:
            if value != task.target or int(hit[1]) != value:
                r.error, r.quote, r.why = "logic_non_sequitur", hit[0], f"{value} is not {task.target}"
            elif left:
                r.error, r.quote, r.why = "dropped_case", hit[0], f"{left[0]} is not used"
        if miss and value == task.target and not left and not r.error:
            r.error, r.quote, r.why = "logic_non_sequitur", miss[0], f"{value} is {task.target}"
        r.solves = bool(hit) and not r.error
