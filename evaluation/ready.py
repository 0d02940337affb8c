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
from neureasoner.traces import THINK_CLOSE


def check_thinking(base: str, arms: Sequence[Arm]) -> None:
    """Closing a thinking that a model does not know would measure nothing: says so where neither a token nor the
    template tells that the model knows it. (A tokenizer that could not even spell it is not loaded.)"""
    from neureasoner.models import load_tokenizer
    from neureasoner.steps import Separators

    closing = [a.name for a in arms if a.nothinking or a.baseline not in ("", "wait_penalty")]
    if not closing:
        return
    tokenizer = load_tokenizer(base)
    separators = Separators.of(tokenizer)
    if not separators.closing and THINK_CLOSE not in str(getattr(tokenizer, "chat_template", None)):
        print(
            f"note: {THINK_CLOSE} is no token of {base} and not in its chat template; if the model was not trained to "
            f"think, {', '.join(closing)} measure nothing"
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
