"""Baselines that the plan language can say: each is a ``SteeredModel`` under a plan made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neureasoner.errors import UserError
from neureasoner.inference.plan import Action, Plan, Rule, Trigger
from neureasoner.inference.steered import SteeredModel
from neureasoner.steps import Separators
from neureasoner.traces import NO_THINKING, THINK_CLOSE

CLOSE = f"\n{THINK_CLOSE}\n\n"  # closes a thinking wherever it stands, also in the middle of a line
# The keywords of NoWait (Wang et al., arXiv 2506.08343).
WAIT_WORDS = (
    "wait", "alternatively", "hmm", "but", "however", "alternative", "another", "check", "double-check", "oh", "maybe",
    "verify", "other", "again", "now", "ah", "any",
)  # fmt: skip


def vanilla(model: Any, tokenizer: Any) -> SteeredModel:
    """Nothing watched, nothing forced."""
    return SteeredModel(model, tokenizer, Plan("vanilla"))


def start_rule(share: float = 1.0) -> Rule:
    """NoThinking's closed thinking, forced before the first token, so that it is counted (core.md §5.9). Where the
    prompt opens none, ``<think>`` is forced before it; where it has closed one, nothing is.

    ``share``: of the responses, drawn by a coin.
    """
    return Rule("no_thinking", Trigger(start=True, gate=None if share == 1 else share), Action(force=NO_THINKING))


def no_thinking(model: Any, tokenizer: Any, share: float = 1.0) -> SteeredModel:
    """NoThinking; with budget forcing: ``budget_forcing(..., no_thinking=True)``. The prefill counts as generated.

    ``share``: closed in that share of the responses only, drawn by a coin: the control of a rule that closes some.

    ``vanilla(...).generate(..., nothinking=True)`` samples after the same prefill as a part of the prompt, uncounted.
    """
    return SteeredModel(model, tokenizer, Plan("no_thinking", (start_rule(share),)))


def thinking_budget(model: Any, tokenizer: Any, tokens: int, text: str = CLOSE) -> SteeredModel:
    """Close a thinking that is still open after ``tokens`` response tokens, then let the model answer."""
    if tokens < 1:
        raise UserError(f"thinking_budget: tokens must be at least 1, got {tokens}; for 0 use no_thinking")
    when = Trigger(always=True, immediate=True, min_tokens=tokens)
    return SteeredModel(model, tokenizer, Plan("thinking_budget", (Rule("budget", when, Action(force=text)),)))


def word_tokens(tokenizer: Any, words: Sequence[str]) -> dict[str, int]:
    """Vocabulary entries that are one of ``words`` but for white space around it and the case of its letters."""
    separators, wanted = Separators.of(tokenizer), {w.casefold() for w in words}
    found = {}
    for token, i in tokenizer.get_vocab().items():
        if separators.texts[i].decode("utf-8", errors="replace").strip().casefold() in wanted:
            found[token] = i
    return found


def wait_penalty(model: Any, tokenizer: Any, penalty: float = 100.0, words: Sequence[str] = WAIT_WORDS) -> SteeredModel:
    """``penalty`` off the logits of wait-like words at every response token; the default all but forbids them.

    Words that the tokenizer only spells in pieces are let alone. Raises UserError if that is all of them.
    """
    tokens = word_tokens(tokenizer, words)
    if not tokens:
        raise UserError(f"wait_penalty: none of {', '.join(words)} is a single token of this tokenizer; name others")
    action = Action(add_logits=dict.fromkeys(sorted(tokens), -float(penalty)))
    return SteeredModel(model, tokenizer, Plan("wait_penalty", (Rule("wait_penalty", Trigger(decode=True), action),)))
