"""``inference calibrate``: the largest strength of a rule whose KL from the plain model stays in a budget.

The plain model answers greedily; the steered model then reads the same responses token by token, as it would have
written them (hooks, alarms, gates and all), and both models' next-token distributions are compared.

The calibrator of related.md §G. Legend: ``B`` rows of a batch, ``T`` response tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from neureasoner.errors import UserError
from neureasoner.inference.calibrate_config import CalibrateConfig
from neureasoner.inference.plan import PLAN_FILE, Plan
from neureasoner.inference.steered import SteeredModel
from neureasoner.model_files import model_files, resolve
from neureasoner.prompts import encode_prompt
from neureasoner.sampler import sample
from neureasoner.sampling import Sampling, eos_ids, pad_id
from neureasoner.stages import StageFolder
from neureasoner.traces import read_problems


class Keep:
    """Keeps every step's log-probabilities ``[B, V]`` and lets the scores be."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """One step."""
        self.steps.append(scores.log_softmax(-1))
        return scores


class Replay:
    """Adds up KL(plain || these scores) of every step, and makes the plain run's next token certain.

    ``rows``: the plain run's tokens, row by row. ``total [B]`` float64: nats over each row's own tokens.
    """

    def __init__(self, plain: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]):
        self.plain, self.t, device = plain, 0, plain[0].device
        self.lengths = torch.tensor([len(row) for row in rows], device=device)
        width = max(map(len, rows))
        self.tokens = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=device)
        self.total = torch.zeros(len(rows), dtype=torch.float64, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """One step."""
        p, q = self.plain[self.t].double(), scores.double().log_softmax(-1)
        self.total += (p.exp() * (p - q)).sum(-1) * (self.t < self.lengths)
        forced = torch.full_like(scores, float("-inf")).scatter(1, self.tokens[:, self.t : self.t + 1], 0.0)
        self.t += 1
        return forced


def divergences(
    steered: SteeredModel, plans: Sequence[Plan], prompts: Sequence[Sequence[int]], cap: int
) -> torch.Tensor:
    """(KL summed over the responses' tokens by plan ``[P]``, then their number), float64, for one batch of prompts."""
    model, tokenizer = steered.model, steered.tokenizer
    ends = eos_ids(model, tokenizer)
    greedy = partial(
        sample, model, prompts, Sampling(cap, temperature=0.0, top_p=1.0), ends=ends, pad=pad_id(tokenizer, ends)
    )
    keep = Keep()
    rows = [row.ids for row in greedy(processors=[keep]).rows]
    sums = []
    for plan in plans:
        replay = Replay(keep.steps, rows)
        controller = steered.with_plan(plan).controller() if plan.rules else None
        with controller.watch(prompts, eos_ids=ends) if controller else nullcontext() as watch:
            greedy(watch=watch, processors=[replay])
        sums.append(replay.total.sum())
    return torch.stack([*sums, sums[0].new_tensor(float(sum(map(len, rows))))])


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Stage ``inference calibrate``. Prints the KL of each strength, and which to write into the plan.

    Raises UserError for a rule that is not there, one that forces a text (its KL is infinite) or takes its strength row
    by row, and where even the smallest strength is over the budget.
    """
    from neureasoner.progress import Progress

    path = Path(config.plan) if config.plan else Path(resolve(config.model)) / PLAN_FILE
    plan = Plan.load(path)
    rule = _rule(plan, config.rule)
    problems = list(islice(read_problems(config.problems), config.limit or None))
    if not problems:
        raise UserError(f"{config.problems}: holds no problems")
    inputs: list[str | Path] = [path, *plan.files, config.problems, *model_files(config.model)]
    folder = StageFolder(config.out, "inference calibrate", config, inputs=inputs)
    if folder.done:
        return folder.summary
    strengths = sorted(config.strengths, key=abs)
    alone = plan.select([rule])
    plans = [_at(alone, rule, s) for s in strengths]
    steered = SteeredModel.from_pretrained(config.model, plans[0], device=config.device or None)
    prompts = [encode_prompt(steered.tokenizer, p) for p in problems]
    total = torch.zeros(len(plans) + 1, dtype=torch.float64)
    with Progress() as bar, torch.inference_mode():
        task = bar.add_task("reading responses", total=len(prompts))
        for start in range(0, len(prompts), config.batch_size):
            part = prompts[start : start + config.batch_size]
            total += divergences(steered, plans, part, config.max_new_tokens).cpu()
            bar.update(task, advance=len(part))
    kl = (total[:-1] / total[-1]).tolist()
    within = [s for s, value in zip(strengths, kl, strict=True) if value <= config.budget]
    for s, value in zip(strengths, kl, strict=True):
        print(f"  {rule} at {s:g}: KL {value:.4g} nats a token{'' if value <= config.budget else ', over the budget'}")
    if not within:
        raise UserError(
            f"rule {rule}: the smallest strength, {strengths[0]:g}, has a KL of {kl[0]:.4g} already, over the budget "
            f"{config.budget:g}; try smaller ones in another folder"
        )
    chosen = max(within, key=abs)
    print(f"{rule}: write `strength: {chosen:g}` (times its schedule or draw, if it has one) into {path}")
    return folder.finish(
        {
            "rule": rule,
            "strength": chosen,
            "budget": config.budget,
            "kl": {f"{s:g}": value for s, value in zip(strengths, kl, strict=True)},
            "tokens": int(total[-1]),
            "problems": len(problems),
        }
    )


def _at(plan: Plan, name: str, strength: float) -> Plan:
    rules = tuple(replace(r, strength=replace(r.strength, value=strength)) if r.name == name else r for r in plan.rules)
    return replace(plan, rules=rules)


def _rule(plan: Plan, name: str) -> str:
    """The rule that is calibrated. Raises UserError."""
    steering = [r.name for r in plan.rules if not r.forces]
    if name and plan.rule(name).forces:
        raise UserError(f"rule {name} forces a text, which has no strength; name one of {steering or 'another plan'}")
    if not name and len(steering) != 1:
        raise UserError(f"plan {plan.name}: {len(steering)} of its rules have a strength; name one with rule")
    found = name or steering[0]
    if plan.rule(found).strength.per_row:
        raise UserError(f"rule {found} takes its strength row by row at generation; set per_row to false first")
    return found
