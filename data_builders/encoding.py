"""From a reconstructed row to ``input_ids`` and ``labels``: what trains and what does not (core.md §1.9). No torch.

Labels are -100 exactly on the prompt and on the trigger's tokens. Everything else of the response trains, EOS and the
``[FAILURE_…]`` line included, and by default the injected failure too (the paper's Eq. 6). With ``mask_failure`` the
failed step is context only; the separator that closes it still trains.

The chat template renders the prompt alone (``add_generation_prompt=True``): rendering the whole conversation would let
R1's template delete the thinking. Prompt, response and EOS are then tokenised once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from neureasoner.data_builders.layouts import Reconstruction, Span
from neureasoner.errors import UserError
from neureasoner.prompts import prompt_text
from neureasoner.spelling import loses
from neureasoner.traces import FINISHED, INTER, INTRA

IGNORE = -100


class TooLong(UserError):
    """A row that does not fit; rows are never cut."""


def trigger_ids(tokenizer: Any, tokens: Sequence[str] = (INTRA, INTER)) -> dict[str, list[int]]:
    """Ids that stand for each trigger: one if it is a token of its own, otherwise its pieces."""
    return {t: list(tokenizer(t, add_special_tokens=False).input_ids) for t in tokens}


def _tokenise(tokenizer: Any, text: str, start: int, pieces: Sequence[str]) -> tuple[list[int], list[Span]]:
    """Ids and character spans of ``text``; ``pieces`` after ``start`` are tokenised apart, as when they are forced."""
    ids: list[int] = []
    spans: list[Span] = []
    cuts = [0, len(text)]
    for piece in pieces:
        place = text.find(piece, start)
        while place >= 0:
            cuts += [place, place + len(piece)]
            place = text.find(piece, place + len(piece))
    cuts = sorted(set(cuts))
    for begin, end in pairwise(cuts):
        part = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
        ids += part.input_ids
        spans += [(begin + a, begin + b) for a, b in part.offset_mapping]
    return ids, spans


def check_spelled(row_id: str, tokenizer: Any, text: str, ids: Sequence[int]) -> None:
    """Raise UserError, with the first lost characters, unless the ``ids`` of ``text`` hold all of it.

    Nearly always they decode to the very text, and that is all that is looked at.
    """
    if tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text:
        return
    lost = loses(tokenizer, text)
    if lost is not None:
        raise UserError(
            f"row {row_id}: the tokenizer cannot spell it, {lost[:20]!r} is lost; its files are incomplete, or it is "
            "not made for this text"
        )


def _occurrences(ids: Sequence[int], wanted: Sequence[int], start: int) -> list[int]:
    """Positions from ``start`` on where the sequence ``wanted`` begins."""
    return [i for i in range(start, len(ids) - len(wanted) + 1) if list(ids[i : i + len(wanted)]) == list(wanted)]


@dataclass(frozen=True)
class Encoded:
    """Tokens of one row, their labels, and the characters of the response each covers (negative in the prompt)."""

    input_ids: list[int]
    labels: list[int]
    spans: list[Span]


def encode_row(
    row: Reconstruction,
    tokenizer: Any,
    trigger_ids: Mapping[str, list[int]],
    mask_failure: bool = False,
    max_length: int | None = None,
) -> Encoded:
    """Tokens and labels of one row. Needs a fast tokenizer.

    ``trigger_ids``: ids of each trigger text, one or several. A trigger of several ids is tokenised apart from its
    surroundings, because that is how it enters when it is forced. Raises TooLong for a row of more than ``max_length``
    tokens and UserError where the tokens do not match the text or have lost some of it.
    """
    eos = tokenizer.eos_token
    if not eos:
        raise UserError("the tokenizer has no EOS token, so no row could end; name one with eos_token")
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) is a slow one, which does not say where its tokens stand; a "
            "model folder with tokenizer.json is needed"
        )
    prompt = prompt_text(tokenizer, row.prompt)
    response = row.response.removesuffix(eos)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    n_prompt = len(prompt_ids)
    if row.level == "instance":  # the closing text is forced too, so it is context and no target
        trigger_ids = {**trigger_ids, FINISHED: list(tokenizer(FINISHED, add_special_tokens=False).input_ids)}
    in_pieces = [t for t, wanted in trigger_ids.items() if len(wanted) > 1 and t in response]
    ids, spans = _tokenise(tokenizer, prompt + response + eos, len(prompt), in_pieces)
    check_spelled(row.id, tokenizer, prompt + response + eos, ids)
    if max_length is not None and len(ids) > max_length:
        raise TooLong(f"row {row.id} has {len(ids)} tokens, more than max_length {max_length}")
    if ids[:n_prompt] != prompt_ids:
        raise UserError(f"row {row.id}: its first characters merge with the end of the prompt into one token")
    labels = [IGNORE] * n_prompt + ids[n_prompt:]

    n_triggers = 0
    for wanted in trigger_ids.values():
        for place in _occurrences(ids, wanted, n_prompt):
            labels[place : place + len(wanted)] = [IGNORE] * len(wanted)
            n_triggers += 1
    if n_triggers != (0 if row.trigger_span is None else 1):
        raise UserError(f"row {row.id} (level {row.level}) holds {n_triggers} triggers as tokens")

    if mask_failure and row.failure_span is not None:
        if any(b < c for (_, b), (c, _) in pairwise(spans)):
            raise UserError("the tokenizer's offsets leave gaps, so no failure can be masked; set mask_failure: false")
        first, last = (len(prompt) + c for c in row.failure_span)
        for i, (a, b) in enumerate(spans):
            if a < last and first < b <= last:  # a token that holds the separator too ends beyond the span: it trains
                labels[i] = IGNORE
    return Encoded(ids, labels, [(a - len(prompt), b - len(prompt)) for a, b in spans])
