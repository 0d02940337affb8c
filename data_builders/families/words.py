"""A story in words: somebody has things, gains and loses some, while others' things do not matter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from neureasoner.data_builders.families.base import (
    ROUGHLY,
    SLOWLY,
    Narration,
    Review,
    calculate,
    check_key,
    equations,
    pick_checks,
    pick_step,
    slow_check,
    write_equation,
    wrong_conclusion,
    wrong_equation,
)
from neureasoner.errors import UserError

NAMES = ["Mia", "Tom", "Ada", "Ben", "Eva", "Leo", "Zoe", "Max"]
THINGS = ["apples", "pens", "coins", "cards", "stones", "books", "shells", "stamps"]
# (changes, things that do not matter, largest start, largest change, most bags, largest bag)
GRADES = [
    (2, 0, 20, 9, 3, 5),
    (3, 0, 40, 15, 4, 6),
    (3, 1, 60, 30, 5, 9),
    (3, 1, 100, 60, 6, 12),
    (4, 2, 150, 90, 9, 12),
]
START = re.compile(r"(\w+) has (\d+) (\w+)\. ")
EVENT = re.compile(
    r"finds (?P<find>\d+) more\.|buys (?P<bags>\d+) bags with (?P<each>\d+) each\.|gives (?P<give>\d+) away\.|"
    r"loses (?P<lose>\d+)\.|(?P<double>doubles) them\.|(?P<triple>triples) them\.|owns (?P<other>\d+) \w+\."
)


@dataclass(frozen=True)
class Event:
    """kind: gain, loss, bags, times, other. ``b`` is the size of a bag."""

    kind: str
    a: int
    b: int = 0


@dataclass(frozen=True)
class Story:
    name: str
    thing: str
    start: int
    events: tuple[Event, ...]

    def operations(self) -> list[list[tuple[int, str, int]]]:
        """The operations of each event (a bag event has two, an event that does not matter none)."""
        value, out = self.start, []
        for e in self.events:
            ops: list[tuple[int, str, int]] = []
            if e.kind == "bags":
                ops = [(e.a, "*", e.b), (value, "+", e.a * e.b)]
            elif e.kind != "other":
                ops = [(value, {"gain": "+", "loss": "-", "times": "*"}[e.kind], e.a)]
            for op in ops[-1:]:
                value = int(calculate(*op) or 0)
            out.append(ops)
        return out

    def value(self) -> int:
        ops = [o for event in self.operations() for o in event]
        return int(calculate(*ops[-1]) or 0) if ops else self.start


class Words:
    name = "words"
    levels = len(GRADES)

    def generate(self, rng: Random, difficulty: int) -> tuple[str, str]:
        changes, others, start, change, bags, each = GRADES[difficulty - 1]
        while True:
            name, thing = rng.choice(NAMES), rng.choice(THINGS)
            value = first = rng.randint(3, start)
            parts: list[tuple[str, Event]] = []
            for _ in range(changes):
                kind = rng.choice(["find", "bags", "give", "lose", "times" if value < 60 else "bags"])
                n = rng.randint(2, change)
                if kind == "find":
                    parts.append((f"{name} finds {n} more.", Event("gain", n)))
                elif kind == "bags":
                    m, b = rng.randint(2, bags), rng.randint(2, each)
                    parts.append((f"{name} buys {m} bags with {b} each.", Event("bags", m, b)))
                elif kind == "times":
                    m = rng.choice([2, 2, 3])
                    parts.append((f"{name} {'doubles' if m == 2 else 'triples'} them.", Event("times", m)))
                else:
                    text = f"{name} gives {n} away." if kind == "give" else f"{name} loses {n}."
                    parts.append((text, Event("loss", n)))
                value = Story(name, thing, first, tuple(e for _, e in parts)).value()
                if value < 1:
                    break
            if not 1 <= value <= 1999:
                continue
            for _ in range(others):
                n = rng.randint(2, change)
                who = rng.choice([x for x in NAMES if x != name])
                what = rng.choice([t for t in THINGS if t != thing])
                parts.insert(rng.randint(0, len(parts)), (f"{who} owns {n} {what}.", Event("other", n)))
            text = " ".join(t for t, _ in parts)
            return f"{name} has {first} {thing}. {text} How many {thing} does {name} have now?", str(value)

    def parse(self, question: str) -> Story:
        m = START.search(question)
        if not m or "How many" not in question:
            raise UserError(f"not a story question (expected 'Mia has 3 apples. … How many …'): {question!r}")
        events = []
        for e in EVENT.finditer(question, m.end()):
            g = e.groupdict()
            if g["find"]:
                events.append(Event("gain", int(g["find"])))
            elif g["bags"]:
                events.append(Event("bags", int(g["bags"]), int(g["each"])))
            elif g["give"] or g["lose"]:
                events.append(Event("loss", int(g["give"] or g["lose"])))
            elif g["other"]:
                events.append(Event("other", int(g["other"])))
            else:
                events.append(Event("times", 2 if g["double"] else 3))
        return Story(m[1], m[3], int(m[2]), tuple(events))

    def score(self, question: str, answer: str, given: str) -> bool:
        m = re.fullmatch(r"(-?\d+)(?: \w+)?", given.strip())
        return bool(m) and int(m[1]) == self.parse(question).value()  # type: ignore[index]

    def one_line(self, task: Story) -> list[str]:
        return [write_equation(*op) for event in task.operations() for op in event]

    def narrate(self, task: Story, rng: Random) -> Narration:
        value, thing = task.value(), task.thing
        out = [
            rng.choice([f"{task.name} has {task.start} {thing} at first.", f"The start is {task.start} {thing}."]),
            rng.choice([f"I go through the changes one by one.", "I follow the story in order."]),  # noqa: F541
        ]
        if rng.random() < 0.2:
            out.append("Maybe I can sum up all changes at once. That gets messy, so I drop it.")
        steps: list[tuple[int, str, int]] = []
        for event, ops in zip(task.events, task.operations(), strict=True):
            steps += ops
            out.append(self.write_event(event, ops, task))
        out.append(f"That was the last change. So {task.name} has {value} {thing}.")
        for kind in pick_checks(rng, ["line", "back", "slow", "rough"]):
            out.append(self._check(kind, task, value, pick_step(rng, steps)))
        out.append(rng.choice([f"I am sure now. The answer is {value}.", f"So the answer is {value}."]))
        return Narration(out, ", ".join(self.one_line(task)) + f". The answer is \\boxed{{{value}}}.")

    @staticmethod
    def write_event(event: Event, ops: list[tuple[int, str, int]], task: Story) -> str:
        if event.kind == "other":
            return f"The {event.a} things of the other one do not count."
        c = calculate(*ops[-1])
        if event.kind == "bags":
            return f"The bags hold {write_equation(*ops[0])}. Then {write_equation(*ops[1])}. Now it is {c}."
        how = {"gain": "Finding more", "loss": "Having fewer", "times": "Multiplying"}[event.kind]
        return f"{how} gives {write_equation(*ops[0])}. Now it is {c}."

    def _check(self, kind: str, task: Story, value: int, step: tuple[int, str, int]) -> str:
        if kind == "line":
            return "Let me check. " + ", ".join(self.one_line(task)) + ". It agrees."
        if kind == "slow":
            return slow_check(*step)
        mains = [ops[-1] for ops in task.operations() if ops]
        if kind == "back":
            inverse = {"+": "-", "-": "+", "*": "/"}
            lines, at = [], value
            for _, o, b in reversed(mains):
                lines.append(write_equation(at, inverse[o], b))
                at = int(calculate(at, inverse[o], b) or 0)
            return f"Going back from {value}: " + ", ".join(lines) + f". It starts with {at}, that fits."
        at, lines = round(task.start, -1), []
        for _, o, b in mains:
            b = b if o == "*" else round(b, -1)
            lines.append(write_equation(at, o, b))
            at = int(calculate(at, o, b) or 0)
        return f"{ROUGHLY}, " + ", ".join(lines) + f". That is near {value}."

    def review(self, task: Story, paragraphs: list[str]) -> list[Review]:
        value, total, place = task.value(), task.start, 0
        given = {task.start, *(n for e in task.events if e.kind != "other" for n in (e.a, e.b) if n)}
        known, out = set(given), []
        passed = {task.start: 0}  # total -> place in the story where it held
        for text in paragraphs:
            r, eqs = Review(), equations(text)
            back = re.match(r"Back to (\d+)\.", text)
            if back and int(back[1]) in passed:
                total = int(back[1])
                place = passed[total]
            elif back:
                r.error, r.quote, r.why = "hallucination", back[0], "there was no such total before"
            free = text.startswith((SLOWLY, ROUGHLY))
            r.key = ("route",) if text.startswith("Maybe") else check_key(text, eqs)
            for q in eqs:
                bad = wrong_equation(q, None if free else known)
                if bad and not r.error:
                    r.error, r.quote, r.why = bad.error, bad.quote, bad.why
                known.update((q.c, int(calculate(q.a, q.op, q.b) or 0)))
            if eqs:
                r.result = eqs[-1].c
            if eqs and r.key is None and not free:
                place = self._follow(text, eqs, task, total, place, r)
                total = eqs[-1].c
                stated = re.search(r"Now it is (-?\d+)\.", text)
                if stated:
                    if int(stated[1]) != total and not r.error:
                        r.error, r.quote, r.why = "hallucination", stated[0], f"the step gave {total}"
                    total = int(stated[1])
                known.add(total)
                passed[total] = place
            claim = re.search(rf"(?:The answer is|the answer is|So {task.name} has) (-?\d+)", text)
            if claim and not r.error and not free:
                if int(claim[1]) != total:
                    r.error, r.quote, r.why = "hallucination", claim[0], f"the steps gave {total}"
                elif any(e.kind != "other" for e in task.events[place:]):
                    r.error, r.quote, r.why = "dropped_case", claim[0], "a change of the story is missing"
            others = re.match(r"The (\d+) things of the other one", text)
            if others and int(others[1]) not in [e.a for e in task.events if e.kind == "other"] and not r.error:
                r.error, r.quote, r.why = "hallucination", others[0], "the story names no such things"
            if not r.error:
                wrong_conclusion(text, eqs, r)
            r.solves = bool(claim and int(claim[1]) == value)
            out.append(r)
        return out

    @staticmethod
    def _follow(text: str, eqs: list, task: Story, total: int, place: int, r: Review) -> int:  # type: ignore[type-arg]
        """Match one derivation step with the next change of the story; return the place after it."""

        def expected(e: Event) -> list[tuple[int, str, int]]:
            if e.kind == "bags":
                return [(e.a, "*", e.b), (total, "+", eqs[0].c)]
            return [(total, {"gain": "+", "loss": "-", "times": "*"}[e.kind], e.a)]

        said = [(q.a, q.op, q.b) for q in eqs]
        later = [i for i in range(place, len(task.events)) if task.events[i].kind != "other"]
        for i in later:
            if said == expected(task.events[i]):
                if i != later[0] and not r.error:
                    r.error, r.quote, r.why = "dropped_case", eqs[0].text, "a change of the story was left out"
                return i + 1
        if not r.error:
            r.error, r.quote, r.why = "logic_non_sequitur", eqs[-1].text, "this is not the next change of the story"
        return later[0] + 1 if later else place
