"""Judges that are language models: traces -> questions, answers -> labels (core.md §1.3). No network here.

The prompts are the files in ``prompts/``. A trace is hostile text: it is put into its section in one pass, neutralised
(``quotes.neutral``), and what the model says of it counts only as far as schema and text bear it out. The quoted step
must stand in the trace, the named paragraph must exist and leave room for a loop, and paragraphs repeated word for word
are a loop whatever the model says. An answer that fails is Malformed, so the endpoint asks again and says why; a trace
that gets no usable answer gets no labels.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from importlib.resources import files
from string import Template
from typing import Any

from neureasoner.data_builders.endpoint.requests import Malformed, Message, Outcome, Question, Request
from neureasoner.data_builders.families import FAMILIES
from neureasoner.data_builders.grading.grade import answer_of, grade
from neureasoner.data_builders.judges import BLOCK_STARTS, MIN_LOOP, review_steps
from neureasoner.data_builders.layouts import Span
from neureasoner.data_builders.quotes import QuoteFinder, fold, neutral, step_of
from neureasoner.data_builders.schemas import InterAnswer, IntraAnswer, json_schema, printable, read_json
from neureasoner.errors import UserError
from neureasoner.traces import InterLabel, IntraLabel, Labels, Trace

PROMPTS = ("judge_intra", "judge_inter", "rewrite_intra", "rewrite_inter")
SIMILAR = 0.5  # character 3-gram Jaccard of a repeated attempt (core.md §1.2.2)
GAP = 4  # paragraphs without a repetition after which a loop has ended
LOOK_BACK = 32  # paragraphs a paragraph is compared with
SAME = 40  # folded characters from which a paragraph repeated word for word tells something
_PARAGRAPHS = re.compile(
    r"paragraphs?\s{0,3}#?(\d{1,7})(?:\s{0,3}(?:-|–|—|to|through)\s{0,3}(?:paragraph\s{0,3})?(\d{1,7}))?", re.I
)

Ask = Callable[[Iterable[Question[Any]]], Iterable[Outcome[Any]]]


class Unaskable(ValueError):
    """A trace that no question is made of. The message says why, and is counted."""


@dataclass(frozen=True)
class CallSettings:
    """What every question of a job shares. ``params``: temperature, max_tokens, effort (``EndpointConfig.params``).

    ``max_characters``: longer problems or traces are not asked about.
    """

    model: str
    params: Mapping[str, Any] = field(default_factory=dict)
    max_characters: int = 400_000


@cache
def _prompt_file(name: str) -> str:
    return (files("neureasoner.data_builders") / "prompts" / f"{name}.md").read_text(encoding="utf-8")


def prompts_hash() -> str:
    """SHA-256 over all prompt files; goes into the cards of what was made with them."""
    text = "".join(f"{name}\n{_prompt_file(name)}\n" for name in PROMPTS)
    return hashlib.sha256(text.encode()).hexdigest()


def messages(name: str, **parts: str) -> tuple[Message, ...]:
    """The messages of prompt ``name``, each part put in once and not looked at again. Parts must be neutral already."""
    system, _, user = _prompt_file(name).partition("\n=====\n")
    return Message("system", system.strip()), Message("user", Template(user).substitute(parts).strip())


def numbered(texts: Iterable[str]) -> str:
    """Paragraphs with their numbers, from 1, neutralised one by one so that only these marks are marks."""
    return "\n\n".join(f"[Paragraph {i}]\n{neutral(t)}" for i, t in enumerate(texts, 1))


class _Shown:
    """A trace as the judge sees it, and what its answers are checked against (computed when first needed)."""

    def __init__(self, trace: Trace):
        self.trace = trace
        texts = [trace.response[s.char_start : s.char_end] for s in trace.steps]
        # Trigger blocks are no reasoning: they keep their number and lose their text.
        self.blocks = [t.lstrip().startswith(BLOCK_STARTS) for t in texts]
        self.texts = ["(left out)" if b else t.strip() for t, b in zip(texts, self.blocks, strict=True)]

    @cached_property
    def finder(self) -> QuoteFinder:
        """Finds quotes in the thinking. Places are places in the response, for ``neutral`` keeps every length."""
        end = max(s.char_end for s in self.trace.steps)
        text = neutral(self.trace.response[:end])
        for step, block in zip(self.trace.steps, self.blocks, strict=True):
            if block:
                gap = "\n" * (step.char_end - step.char_start)
                text = text[: step.char_start] + gap + text[step.char_end :]
        return QuoteFinder(text)

    @cached_property
    def repeated(self) -> int | None:
        """First of three paragraphs in a row that each repeat an earlier one word for word; None if there is none."""
        seen: set[str] = set()
        run = 0
        for i, (text, block) in enumerate(zip(self.texts, self.blocks, strict=True)):
            words = "" if block else fold(text).text
            run = run + 1 if words in seen else 0
            if run == MIN_LOOP:
                return i - MIN_LOOP + 1
            if len(words) >= SAME:
                seen.add(words)
        return None


def _shown(trace: Trace, settings: CallSettings) -> _Shown:
    if not trace.steps:
        raise Unaskable("no thinking")
    longest = max(len(trace.response), len(trace.problem.question))
    if longest > settings.max_characters:
        raise Unaskable(f"too long: {longest} characters")
    return _Shown(trace)


def _request(level: str, shown: _Shown, settings: CallSettings, model: Any) -> Request:
    problem = neutral(shown.trace.problem.question)
    turns = messages(f"judge_{level}", problem=problem, trace=numbered(shown.texts))
    return Request(settings.model, turns, json_schema(model), f"{level}_judgement", dict(settings.params))


class LocatedIntraLabel(IntraLabel):
    """An IntraLabel that remembers how its quote was found: exact, normalised or fuzzy. No dataclass field of it."""

    found = ""


def intra_question(trace: Trace, settings: CallSettings) -> Question[IntraLabel]:
    """Ask for the first wrong step. The value has the step, its characters and the words as they stand in the trace.

    Raises Unaskable for a trace without thinking or too long.
    """
    shown = _shown(trace, settings)

    def read(text: str) -> IntraLabel:
        answer = read_json(text, IntraAnswer)
        label = LocatedIntraLabel(explanation=answer.explanation)
        if not answer.has_error:
            return label
        place = shown.finder.find(answer.first_error_step or "")
        step = None if place is None else step_of(trace, place.span)
        if place is None or step is None or shown.blocks[step]:
            raise Malformed("quote not in the trace: first_error_step must be copied verbatim from one paragraph")
        label.has_error, label.error_type, label.step = True, answer.error_type, step
        label.span, label.found = place.span, place.how
        label.first_error_step = trace.response[slice(*place.span)]
        return label

    return Question(f"{trace.id}/intra", _request("intra", shown, settings, IntraAnswer), read)


def inter_question(trace: Trace, settings: CallSettings) -> Question[InterLabel]:
    """Ask for the first loop. The value has the loop's steps and characters; ``attempts`` is left to ``probes locate``.

    Raises Unaskable for a trace without thinking or too long.
    """
    shown = _shown(trace, settings)

    def read(text: str) -> InterLabel:
        answer = read_json(text, InterAnswer)
        if not answer.is_stagnant:
            if shown.repeated is not None:
                raise Malformed(
                    f"loop overlooked: from paragraph {shown.repeated + 1} on, three in a row repeat earlier ones"
                )
            return InterLabel(explanation=answer.explanation)
        first, end = _extent(answer.loop_detected_at, shown)
        return InterLabel(
            is_stagnant=True,
            loop_detected_at=f"Paragraph {first + 1}",
            loop_theme=answer.loop_theme,
            severity=answer.severity,
            explanation=answer.explanation,
            span=(trace.steps[first].char_start, trace.steps[end - 1].char_end),
            steps=(first, end),
        )

    return Question(f"{trace.id}/inter", _request("inter", shown, settings, InterAnswer), read)


def _extent(said: str, shown: _Shown) -> Span:
    """Steps of the loop, half open. Raises Malformed for a paragraph that does not exist or leaves no room."""
    match = _PARAGRAPHS.search(said[:200]) or re.fullmatch(r"\s*(\d{1,7})()\s*", said[:200])
    if match is None:
        raise Malformed(f"no paragraph named: loop_detected_at must read like Paragraph 4, not {printable(said, 40)}")
    n, first = len(shown.texts), int(match[1]) - 1
    last = int(match[2]) if match[2] else 0
    if not 0 <= first < n or last > n:
        raise Malformed(f"no such paragraph: the trace has paragraphs 1 to {n}")
    if (last or n) - first < MIN_LOOP:
        raise Malformed(f"no loop there: a loop has at least {MIN_LOOP} consecutive paragraphs")
    return first, last or loop_end(shown.texts, first)


def loop_end(texts: list[str], first: int) -> int:
    """One past the last paragraph of a loop that begins at ``first`` (core.md §1.2.2).

    The loop goes on as long as paragraphs come that are like an earlier one of it (3-gram Jaccard at least 0.5), with
    at most GAP others between. Where none is, or they make fewer than three, nothing is known; it ends with the trace.
    """
    grams: list[set[str]] = []
    last = first
    for i in range(first, len(texts)):
        if i - last > GAP + 1:
            break
        flat = re.sub(r"\s+", " ", texts[i][:4000].strip().lower())
        mine = {flat[k : k + 3] for k in range(max(1, len(flat) - 2))}
        if any(len(mine & g) >= SIMILAR * len(mine | g) for g in grams[-LOOK_BACK:]):
            last = i
        grams.append(mine)
    return last + 1 if last + 1 - first >= MIN_LOOP else len(texts)


class LLMJudge:
    """A judge that answers through ``ask`` (questions in, outcomes out, in any order).

    ``counts``: traces labelled, quotes by how they were found, and every drop with its reason.
    """

    def __init__(self, settings: CallSettings, ask: Ask):
        self.settings = settings
        self.ask = ask
        self.name = f"llm:{settings.model}"
        self.counts: Counter[str] = Counter()

    def judge(self, trace: Trace) -> Labels:
        """Labels of one trace. Raises Malformed when no answer to it could be used (``counts`` says why)."""
        (judged,) = self.label([replace(trace)])
        if judged.labels is None:
            raise Malformed(f"trace '{trace.id}' got no usable answer")
        return judged.labels

    def label(self, traces: Iterable[Trace]) -> Iterator[Trace]:
        """Every trace, in order, its labels set or None. Streams as far as ``ask`` does.

        Raises UserError for two traces with one id that are under way together.
        """
        source = iter(traces)
        line: deque[Trace] = deque()  # filled by whoever draws the questions, which may be another thread
        got: dict[str, dict[str, Outcome[Any]]] = {}
        unasked: dict[str, str] = {}

        def questions() -> Iterator[Question[Any]]:
            for trace in source:
                if trace.id in got:
                    raise UserError(f"trace id '{trace.id}' occurs twice; ids must be unique")
                got[trace.id] = {}
                both: list[Question[Any]] = []
                try:
                    both = [intra_question(trace, self.settings), inter_question(trace, self.settings)]
                except Unaskable as e:
                    unasked[trace.id] = str(e)
                line.append(trace)
                yield from both

        def ready(last: bool = False) -> Iterator[Trace]:
            while line and (last or line[0].id in unasked or len(got[line[0].id]) == 2):
                trace = line.popleft()
                self._settle(trace, got.pop(trace.id), unasked.pop(trace.id, ""))
                yield trace

        for outcome in self.ask(questions()):
            name, _, level = outcome.id.rpartition("/")
            got[name][level] = outcome
            yield from ready()
        yield from ready(last=True)
        for trace in source:  # ``ask`` stopped before it drew every question
            self._settle(trace, {}, "not asked")
            yield trace

    def _settle(self, trace: Trace, outcomes: dict[str, Outcome[Any]], unasked: str) -> None:
        """Set the labels, or count why there are none."""
        trace.labels = None
        reasons = [unasked] if unasked else []
        for level in () if unasked else ("intra", "inter"):
            if (o := outcomes.get(level)) is None or o.value is None:
                reasons.append(f"{level}, {o.problems[-1] if o and o.problems else 'no answer'}")
        if not reasons:
            trace.labels = self._labels(trace, outcomes["intra"].value, outcomes["inter"].value)
            return
        self.counts["dropped"] += 1
        for reason in reasons:
            self.counts[f"dropped: {reason.partition(':')[0][:80]}"] += 1  # without particulars, to be countable

    def _labels(self, trace: Trace, intra: Any, inter: Any) -> Labels:
        self.counts["labelled"] += 1
        if intra.found:
            self.counts[f"quote {intra.found}"] += 1
        answer = answer_of(trace.problem, trace.response) if trace.finished else None
        return Labels(
            correct=grade(trace.problem, answer),
            answer=answer,
            intra=IntraLabel(**{f.name: getattr(intra, f.name) for f in fields(IntraLabel)}),
            inter=inter,
            answer_token=_answer_token(trace),
            judge=self.name,
        )


def _answer_token(trace: Trace) -> int | None:
    """As the exact judge finds it, for problems of an embedded family; nothing is known of others."""
    if trace.problem.family not in FAMILIES:
        return None
    try:
        reviews = review_steps(trace.problem, [trace.response[s.char_start : s.char_end] for s in trace.steps])
    except ValueError:  # a number of more digits than Python reads
        return None
    solved = next((i for i, r in enumerate(reviews) if r.solves), None)
    return None if solved is None else trace.steps[solved].token_end
