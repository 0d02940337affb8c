"""What arms need besides weights, looked at before anything is generated: an arm that cannot run costs no other one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from neureasoner.artifacts import read_json
from neureasoner.errors import UserError
from neureasoner.evaluation.arms import Arm
from neureasoner.model_files import resolve


def check_thinking(base: str, arms: Sequence[Arm]) -> None:
    """Closing a thinking that a model does not know would measure nothing. Raises UserError."""
    from neureasoner.models import load_tokenizer
    from neureasoner.steps import Separators

    closing = [a.name for a in arms if a.nothinking or a.baseline not in ("", "wait_penalty")]
    if closing and Separators.of(load_tokenizer(base)).think_close is None:
        raise UserError(
            f"{base}: its tokenizer knows no </think>, so there is no thinking to close; leave out {', '.join(closing)}"
        )


def check_ready(model: str, base: str, arms: Sequence[Arm]) -> None:
    """Small files only: probes, directions and gates of the plan, and the texts and words that the tokenizer must know.

    Raises UserError naming the missing file, or what the tokenizer cannot spell.
    """
    from neureasoner.inference.baselines.plans import WAIT_WORDS, word_tokens
    from neureasoner.models import load_tokenizer

    if any(a.baseline == "wait_penalty" for a in arms) and not word_tokens(load_tokenizer(base), WAIT_WORDS):
        raise UserError(
            f"{base}: none of the words that wait_penalty forbids is a single token of its tokenizer; leave it out"
        )
    if any(a.model == "steered" for a in arms):
        _check_steered(Path(resolve(model)), any(a.trigger == "paper" for a in arms))


def _check_steered(folder: Path, paper: bool) -> None:
    """What ``SteeredModel.from_pretrained`` and ``paper`` look for, whatever rules an arm keeps."""
    from neureasoner.inference.assemble import CARD
    from neureasoner.inference.plan import Plan
    from neureasoner.inference.steered import (
        SteeredModel,
        check_reachable,
        check_tokenizer,
        load_directions,
        load_gates,
        load_probes,
    )
    from neureasoner.models import load_tokenizer

    plan, tokenizer = Plan.load(folder), load_tokenizer(str(folder))
    card: dict[str, Any] = read_json(folder / CARD) if (folder / CARD).is_file() else {}
    check_tokenizer(folder, card, tokenizer)
    plans = [plan]
    if paper:  # the plan alone, without a model to put it on
        bare = SimpleNamespace(plan=plan, with_plan=lambda changed: changed)
        plans.append(cast(Plan, SteeredModel.paper(cast(Any, bare))))
    for each in plans:
        check_reachable(each, load_probes(each))
        load_directions(each)
        load_gates(each)
        each.forced_ids(tokenizer)
