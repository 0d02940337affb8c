"""A rewriter that is a language model: reference -> question, answer -> validated Reconstruction (core.md §1.8).

The model returns nothing but a trace. What was copied, where the failure lies and where the block begins and ends is
worked out here; the copied steps are put back in the reference's own words, the row is composed anew and validated, and
every reason to reject it is what the model is told on the next attempt. Interchangeable with ``ExactRewriter``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from random import Random
from typing import Any

from neureasoner.data_builders.endpoint.requests import Malformed, Question, Request
from neureasoner.data_builders.grading.answers import last_boxed
from neureasoner.data_builders.grading.grade import answer_of, grade
from neureasoner.data_builders.layouts import (
    ERROR_LENGTHS,
    ERROR_TYPES,
    LOOP_LENGTHS,
    LOOP_THEMES,
    STYLE,
    Block,
    InterBlock,
    IntraBlock,
    LayoutError,
    Reconstruction,
    compose,
    is_trigger_like,
    paragraphs,
    parse,
    validate_inter,
    validate_intra,
)
from neureasoner.data_builders.llm_judges import Ask, CallSettings, messages
from neureasoner.data_builders.quotes import QuoteFinder, fold, neutral
from neureasoner.data_builders.rewriters import Reference, Rejected
from neureasoner.data_builders.schemas import check_text
from neureasoner.traces import INTER, INTRA, THINK_CLOSE, THINK_OPEN, Problem

KEEP = 2  # steps that must be copied at least
FIELDS: dict[str, tuple[tuple[str, Sequence[Any]], tuple[str, Sequence[Any]]]] = {
    "intra": (("error_length", ERROR_LENGTHS), ("error_type", ERROR_TYPES)),
    "inter": (("loop_length_paragraphs", LOOP_LENGTHS), ("loop_theme", LOOP_THEMES)),
}
# Looked for in folded text, as triggers are, so invisible letters and full-width forms hide nothing.
_CHAT_TOKEN = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?(?:think|s|bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>", re.IGNORECASE
)
_PROMPT_TAG = re.compile(
    r"<\s?/?\s?(?:PROBLEM|REFERENCE_REASONING|REASONING_TRACE|CONTROL)\b|\[Paragraph \d", re.IGNORECASE
)
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_FENCED = re.compile(r"\A```[a-zA-Z]{0,10}[ \t]*\n(.*)\n```\Z", re.DOTALL)


def controls(level: str, index: int, seed: int = 0) -> dict[str, Any]:
    """Control fields number ``index`` of an endless, seeded and balanced sequence for ``level`` (intra or inter).

    Every stretch of 18 (intra) or 12 (inter) that begins at a multiple of it holds each size with each kind once, so
    their counts in any prefix differ by one at most. A pure function: shards and resumed jobs agree.
    """
    grid = _grid(level)
    order = list(range(len(grid)))
    Random(f"controls-{seed}-{level}-{index // len(grid)}").shuffle(order)
    return grid[order[index % len(grid)]]


def _grid(level: str) -> list[dict[str, Any]]:
    (size, sizes), (kind, kinds) = FIELDS[level]
    return [{size: a, kind: b, "style": STYLE} for a, b in product(sizes, kinds)]


def unusable(reference: Reference) -> str:
    """Why no question is made of this reference ("" if one can be): the rules that need no model."""
    if len(reference.paragraphs) < KEEP + 1:
        return f"fewer than {KEEP + 1} paragraphs"
    text = "\n\n".join([reference.problem.question, *reference.paragraphs, reference.ending])
    folded = fold(text).text
    if is_trigger_like(folded):
        return "trigger-like text in the source"
    if _CHAT_TOKEN.search(folded.replace(THINK_CLOSE, "", 1)):  # the one that ends the thinking belongs there
        return "chat-template token in the source"
    if _CONTROL_CHARACTER.search(text) or any("\ud800" <= c <= "\udfff" for c in text):
        return "control characters or half characters in the source"
    if re.search(r"\s{200}", text):
        return "white space without end in the source"
    if not grade(_with_gold(reference), answer_of(reference.problem, reference.ending)):
        return "no right answer in \\boxed{} to check against"
    return ""


def _with_gold(reference: Reference) -> Problem:
    """The problem with an answer to compare with: its own, else the one the reference ends with."""
    problem = reference.problem
    return problem if problem.answer else replace(problem, answer=last_boxed(reference.ending) or "")


class LLMRewriter:
    """Writes failures, blocks and repairs through ``ask`` (questions in, outcomes out)."""

    def __init__(self, settings: CallSettings, ask: Ask):
        self.settings = settings
        self.ask = ask
        self.name = f"llm:{settings.model}"

    def intra(self, reference: Reference, rng: Random) -> Reconstruction:
        """One wrong step, its diagnosis and repair. Raises Rejected."""
        return self._answer(self.intra_question(reference, rng))

    def inter(self, reference: Reference, rng: Random) -> Reconstruction:
        """A loop, its summary, a pivot and the solution. Raises Rejected."""
        return self._answer(self.inter_question(reference, rng))

    def intra_question(
        self, reference: Reference, rng: Random, control: Mapping[str, Any] | None = None
    ) -> Question[Reconstruction]:
        """The question behind ``intra``. ``control``: fields to use (``controls``), else ``rng`` draws them.

        Raises Rejected for a reference that is not asked about.
        """
        return self._question("intra", reference, rng, control)

    def inter_question(
        self, reference: Reference, rng: Random, control: Mapping[str, Any] | None = None
    ) -> Question[Reconstruction]:
        """The question behind ``inter``; as ``intra_question``."""
        return self._question("inter", reference, rng, control)

    def _question(
        self, level: str, reference: Reference, rng: Random, control: Mapping[str, Any] | None
    ) -> Question[Reconstruction]:
        drawn = rng.choice(_grid(level))  # drawn in any case, so that giving fields does not shift what follows
        fields = dict(control) if control is not None else drawn
        if len(reference.response) > self.settings.max_characters:
            raise Rejected("too long")
        reason = unusable(reference)
        if reason:
            raise Rejected(reason)
        answer = reference.ending.replace(THINK_CLOSE, "", 1).strip()
        turns = messages(
            f"rewrite_{level}",
            problem=neutral(reference.problem.question),
            reference=neutral("\n\n".join([*reference.paragraphs, answer])),
            control="\n".join(f"{k}: {v}" for k, v in fields.items()),
        )
        request = Request(self.settings.model, turns, params=dict(self.settings.params))
        source = Source(reference)
        return Question(f"{reference.id}/{level}", request, lambda text: read_trace(text, level, source, fields))

    def _answer(self, question: Question[Reconstruction]) -> Reconstruction:
        for outcome in self.ask([question]):
            if outcome.value is not None:
                return outcome.value
            raise Rejected(outcome.problems[-1] if outcome.problems else "no answer")
        raise Rejected("no answer")


# --- reading ----------------------------------------------------------------------------------------------------


class Source:
    """A reference and what its rewritten traces are compared with, folded once."""

    def __init__(self, reference: Reference):
        self.reference = reference
        self.paragraphs = reference.paragraphs

    @cached_property
    def keys(self) -> list[str]:
        return [_key(p) for p in self.paragraphs]

    @cached_property
    def text(self) -> str:
        return _key(self.reference.response)


def read_trace(text: str, level: str, source: Source, control: Mapping[str, Any]) -> Reconstruction:
    """A rewritten trace as a validated row. Raises Malformed with everything that is wrong with it."""
    reference = source.reference
    trigger = INTRA if level == "intra" else INTER
    thinking, given = _clean(text, trigger, reference)
    if thinking.count(trigger) != 1:
        raise Malformed(f"{thinking.count(trigger)} times {trigger} instead of once")
    try:
        found = parse(thinking)
    except LayoutError as e:
        raise Malformed(str(e)) from None
    if found.block.trigger != trigger:
        raise Malformed(f"the block is not the one of {trigger}")
    before = _split(thinking[: found.trigger_span[0]])
    after = _split(thinking[found.span[1] :])
    if after and "\\boxed" in after[-1]:
        after.pop()  # the words to the reader; the reference's own, known to be right, take their place
    if not after:
        raise Malformed("nothing follows the block: carry on to the answer in paragraphs of their own")
    size = 1 if level == "intra" else int(control["loop_length_paragraphs"])
    copied, failure = _copied(before, size, source)
    block = _intra_block(found.block, failure, source) if level == "intra" else _inter_block(found.block)
    if level == "inter":
        _check_loop(copied, failure, source)
    try:
        parts = compose(copied, failure, block, after, reference.ending)
    except LayoutError as e:
        raise Malformed(str(e)) from None
    right = grade(_with_gold(reference), given)
    shared = {"keep": min(4, max(KEEP, _same(copied, source))), "failure_span": parts["failure_span"]}
    if level == "intra":
        reasons = validate_intra(reference.paragraphs, parts["response"], lambda _: right, **shared)
    else:
        reasons = validate_inter(
            reference.paragraphs, parts["response"], lambda _: right, loop_paragraphs=size, **shared
        )
    if reasons:
        raise Malformed("; ".join(reasons))
    problem = reference.problem
    return Reconstruction(
        f"{reference.id}/{level}", problem, level, problem.question, **parts, control=dict(control),
        reference_id=reference.id, source=reference.source,
    )  # fmt: skip


def _clean(text: str, trigger: str, reference: Reference) -> tuple[str, str | None]:
    """The trace's thinking, free of wrapping and look-alikes, and the final answer it gives. Raises Malformed."""
    text = check_text(text, 4 * len(reference.response) + 20_000).strip()
    text = text.replace("\r\n", "\n")
    fenced = _FENCED.match(text)
    text = fenced[1] if fenced else text
    if text.startswith(THINK_OPEN):
        inside, _, outside = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
        # Servers that pass on the model's own thoughts put them here; the trace is where the trigger stands.
        text = outside if trigger in outside and trigger not in inside else text.removeprefix(THINK_OPEN)
    if _CONTROL_CHARACTER.search(text):
        raise Malformed("control characters in the trace")
    if re.search(r"\s{200}", text):
        raise Malformed("white space without end")
    source = reference.problem.question + reference.response
    for shown, plain in (("＜", "<"), ("［", "[")):  # what ``neutral`` put in, where the source had none of its own
        text = text if shown in source else text.replace(shown, plain)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    thinking, close, answer = text.partition(THINK_CLOSE)
    folded = fold(thinking + " " + answer).text
    if _CHAT_TOKEN.search(folded):
        raise Malformed("chat-template token in the trace")
    if _PROMPT_TAG.search(folded) and not _PROMPT_TAG.search(fold(source).text):
        raise Malformed("a tag of the prompt in the trace: return the trace only")
    return thinking.strip(), answer_of(reference.problem, answer if close and answer.strip() else thinking)


def _split(text: str) -> list[str]:
    return [text[a:b] for a, b in paragraphs(text)]


def _key(text: str) -> str:
    return fold(text).text


def _same(steps: Sequence[str], source: Source) -> int:
    """How many of the first steps are the reference's."""
    n = 0
    for mine, theirs in zip(steps, source.keys, strict=False):
        if _key(mine) != theirs:
            break
        n += 1
    return n


def _copied(before: list[str], size: int, source: Source) -> tuple[list[str], list[str]]:
    """Steps before the failure, the copied ones in the reference's own words, and the failure. Raises Malformed."""
    copied, failure = before[:-size], before[-size:]
    if len(failure) < size or len(copied) < KEEP:
        raise Malformed(
            f"{len(before)} paragraphs before the block instead of at least {KEEP + size}: copy the first two to four "
            f"paragraphs of the reference, then write {size} of your own"
        )
    same = _same(copied, source)
    if same < KEEP:
        raise Malformed(f"only {same} of the first {KEEP} steps equal the reference")
    if size > 1 and same < len(copied):
        raise Malformed(f"the loop has {len(before) - same} paragraphs instead of {size}")
    return [*source.paragraphs[:same], *copied[same:]], failure


def _intra_block(block: Block, failure: list[str], source: Source) -> IntraBlock:
    """The block with its quote as it stands in the wrong step. Raises Malformed where that cannot be so."""
    assert isinstance(block, IntraBlock)
    wrong = failure[0]
    place = QuoteFinder(wrong).find(block.error_span)
    if place is None or place.how == "fuzzy" or "\n" in (quote := wrong[slice(*place.span)]):
        raise Malformed("the quoted error span does not occur in the paragraph before the trigger")
    if _key(wrong) in source.keys:
        raise Malformed("the paragraph before the trigger is the reference's own: nothing is wrong in it")
    if _key(quote) in source.text:
        raise Malformed("the quoted error span also stands in the reference, so it is no error")
    return replace(block, error_span=quote)


def _inter_block(block: Block) -> InterBlock:
    assert isinstance(block, InterBlock)
    return replace(block, pivot=" ".join(block.pivot.split()))


def _check_loop(copied: list[str], failure: list[str], source: Source) -> None:
    """A loop goes over what was there before; steps the reference takes later are progress. Raises Malformed."""
    before = {_key(p) for p in copied}
    ahead = sum(key in source.keys and key not in before for key in map(_key, failure))
    if ahead > 1:
        raise Malformed(f"{ahead} paragraphs of the loop are copied from the reference")
