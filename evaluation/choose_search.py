"""The plans that ``choose`` tries, and their responses. How it searches stands in ``choose.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from neureasoner.evaluation.arms import Arm
from neureasoner.evaluation.choose_config import OWN, ChooseConfig, share_of
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.metrics import Outcome, interval, per_problem, resampled_means
from neureasoner.evaluation.runner import ArmRun, outcomes
from neureasoner.inference.decode import generate_batch
from neureasoner.inference.plan import Plan
from neureasoner.inference.steered import SteeredModel
from neureasoner.prompts import encode_prompt
from neureasoner.traces import Problem, Trace

PLAN_LESS = "plan_less"
HIGHEST = float(np.nextafter(1.0, 0.0))  # the highest threshold that a probability may exceed


@dataclass(frozen=True)
class Setting:
    """A rule switched on. ``asked``: the threshold as the settings name it; a rule without probe has none."""

    rule: str
    threshold: float | None = None
    min_steps: int | None = None
    asked: str = ""

    @property
    def name(self) -> str:
        """``intra_0.431``, with ``_from4`` where steps were tried too."""
        steps = "" if self.min_steps is None else f"_from{self.min_steps}"
        return self.rule + ("" if self.threshold is None else f"_{self.threshold:.9g}") + steps

    @property
    def change(self) -> dict[str, Any]:
        """What it changes in the rule's trigger."""
        steps = {} if self.min_steps is None else {"min_steps": self.min_steps}
        return steps if self.threshold is None else {"threshold": self.threshold, **steps}

    def may_act(self, watched: Trace) -> bool:
        """Whether the rule may act in the response that this one is without a plan; certainly not where False."""
        return self.threshold is None or _highest(watched, self.rule, self.min_steps or 0) > self.threshold


Candidate = tuple[Setting, ...]


def name_of(candidate: Candidate) -> str:
    """A candidate's name, and that of its files."""
    return "+".join(s.name for s in candidate) or PLAN_LESS


def joint_plans(rules: int) -> int:
    """Plans of several rules that are tried at the least: all together, and each rule left out of more than two."""
    return 0 if rules < 2 else 1 if rules == 2 else 1 + rules


def _highest(trace: Trace, rule: str, min_steps: int) -> float:
    """The highest score of a rule from so many steps on; -inf where it has none."""
    scores = (s for s in trace.meta["scores"] if s["rule"] == rule and s["step"] + 1 >= min_steps)
    return max((float(s["score"]) for s in scores), default=-np.inf)


def threshold_at(share: float, highest: Sequence[float]) -> float | None:
    """The threshold that this share of responses exceeds, as nearly as there are scores; None where there are none."""
    known = sorted((h for h in highest if np.isfinite(h)), reverse=True)
    if not known:
        return None
    k = max(1, round(share * len(highest)))
    return known[k] if k < len(known) else float(np.nextafter(known[-1], -np.inf))


class Run(ArmRun):
    """A candidate's responses: drawn where a rule may act, taken over from the plan-less run elsewhere."""

    def __init__(
        self, name: str, model: Callable[[], Any], config: EvaluateConfig, problems: list[Problem],
        watched: dict[tuple[int, str], Trace], acts: Callable[[Trace], bool],
    ):  # fmt: skip
        super().__init__(Arm(name, ""), model, config, problems)
        self.watched, self.acts = watched, acts

    def _generate(self, sample: int, batch: int, vote: int) -> list[Trace]:
        if not self.watched:
            return super()._generate(sample, batch, vote)
        c, problems, seed = self.config, self.batches[batch], self._seed(sample, batch, vote)
        kept = [self.watched[sample, p.id] for p in problems]
        acts = [self.acts(t) for t in kept]
        if not any(acts):
            return [self._taken_over(t) for t in kept]
        drawn = generate_batch(
            self.model.model,
            self.model.tokenizer,
            [encode_prompt(self.model.tokenizer, p) for p in problems],
            seed=seed,
            controller=self.model.controller(),
            indices=list(range(len(problems))),
            problems=problems,
            only=acts,
            **{k: getattr(c, k) for k in ("max_new_tokens", "temperature", "top_p")},
        )
        rows = zip(problems, drawn, kept, acts, strict=True)
        return [self.trace(p, g, 0, sample, vote, seed) if a else self._taken_over(t) for p, g, t, a in rows]

    def _taken_over(self, trace: Trace) -> Trace:
        return replace(trace, meta={**trace.meta, "arm": self.arm.name})


class Search:
    """Model, plan and problems, loaded once; measures candidates and keeps their outcomes by name."""

    def __init__(self, config: ChooseConfig, problems: list[Problem], plan: Plan):
        self.config, self.problems, self.plan = config, problems, plan
        self.steered = SteeredModel.from_pretrained(config.model, plan, device=config.device or None)
        self.candidates: dict[str, Candidate] = {}
        self.rows: dict[str, list[Outcome]] = {}
        self.watched: dict[tuple[int, str], Trace] = {}
        self.drawn: dict[str, int] = {}
        keys = ("samples", "seed", "max_new_tokens", "temperature", "top_p", "batch_size")
        self.settings = EvaluateConfig(
            config.model, config.problems, config.out, **{k: getattr(config, k) for k in keys}
        )

    def plan_of(self, candidate: Candidate) -> Plan:
        """The candidate as a plan; the plan-less one has all probes read, and none of them acts."""
        if candidate:
            return self.plan.select([s.rule for s in candidate]).replace_triggers(
                {s.rule: s.change for s in candidate if s.change}
            )
        probed = [r.name for r in self.plan.rules if r.trigger.probe is not None]
        steps = {r: {"min_steps": min(tried)} for r, tried in self.config.min_steps.items()}
        return self.plan.select(probed).replace_triggers({r: {"threshold": np.inf, **steps.get(r, {})} for r in probed})

    def settings_of(self, rule: str) -> list[Setting]:
        """What is tried of a rule, each threshold once. Needs the plan-less run."""
        trigger, config = self.plan.rule(rule).trigger, self.config
        if trigger.probe is None:
            return [Setting(rule)]
        own = self.steered.probes[trigger.probe].threshold if trigger.threshold is None else trigger.threshold
        found: dict[str, Setting] = {}
        for steps, asked in product(config.min_steps.get(rule, [None]), config.thresholds.get(rule, config.grid)):
            least = trigger.min_steps if steps is None else steps
            share = share_of(asked)
            if share is not None:
                value = threshold_at(share, [_highest(t, rule, least) for t in self.watched.values()])
            else:
                value = float(own if asked == OWN else asked)
            if value is not None:
                if self.steered.probes[trigger.probe].rule is None:
                    value = min(value, HIGHEST)
                setting = Setting(rule, value, steps, asked)
                found.setdefault(setting.name, setting)
        return list(found.values())

    def measure(self, candidate: Candidate, bar: Any, task: Any) -> str:
        """Generate a candidate's responses as far as they are not there yet. Returns its name."""
        name = name_of(candidate)
        if name in self.rows:
            return name
        plan = self.plan_of(candidate)
        acts = lambda t: any(s.may_act(t) for s in candidate)  # noqa: E731
        run = Run(name, lambda: self.steered.with_plan(plan), self.settings, self.problems, self.watched, acts)
        for sample, batch in [] if run.store.whole else run.jobs:
            run.part(sample, batch)
            bar.update(task, advance=0, so_far=f"{name}: {batch + 1} of {len(run.batches)}, sample {sample + 1}")
        run.merge()
        traces = run.store.traces()
        if not candidate:
            self.watched = {(int(t.meta["sample"]), t.problem.id): t for t in traces}
        self.candidates[name] = candidate
        self.rows[name] = outcomes(traces, self.settings.max_new_tokens)
        self.drawn[name] = sum(map(acts, self.watched.values())) if candidate else len(traces)
        bar.update(task, advance=1, so_far=f"best so far: {self.best()}")
        return name

    def worth(self, name: str, against: str | None = None, ends: bool = False) -> Any:
        """Utility of a candidate, less that of another; ``ends``: ``(value, [low, high])``, an interval by problem.

        The plan-less model has its accuracy, less the price of 100 % of its tokens.
        """
        tables = [per_problem(self.rows[n]) for n in (name, against or PLAN_LESS, PLAN_LESS)]
        a, b, plain = tables
        sign = float(against is not None)
        columns = np.stack([a.accuracy - sign * b.accuracy, a.tokens - sign * b.tokens, plain.tokens], axis=1)

        def value(means: np.ndarray) -> np.ndarray:  # [..., 3] -> [...]
            found: np.ndarray = 100 * (means[..., 0] - self.config.price * means[..., 1] / means[..., 2])
            return found

        mean = float(value(columns.mean(axis=0)))
        if not ends:
            return mean
        return mean, interval(value(resampled_means(columns, self.config.resamples, self.config.seed)))

    def best(self) -> str:
        """The candidate of the highest utility; of equals the one with fewer rules."""
        return max(self.rows, key=lambda n: (round(self.worth(n), 9), -len(self.candidates[n])))

    def run(self, bar: Any) -> str:
        """Everything, in order; the chosen candidate's name."""
        rules, n = self.plan.names, len(self.problems) * self.config.samples
        task = bar.add_task("plans", total=None)
        self.measure((), bar, task)
        grid = {rule: self.settings_of(rule) for rule in rules}
        for rule in (r for r in rules if not grid[r]):
            bar.console.print(f"[yellow]rule {rule} is left out: its probe gave no score in {n} responses[/yellow]")
        alone = [(s,) for tried in grid.values() for s in tried]
        draws = sum(any(s.may_act(t) for s in c) for c in alone for t in self.watched.values())
        live = [r for r in rules if grid[r]]
        joint = joint_plans(len(live))
        bar.console.print(
            f"{len(alone)} plans of one rule: {draws:,} of {len(alone) * n:,} responses are drawn, in the others no "
            f"rule acts; then {joint} or more plans of several rules"
        )
        bar.update(task, total=1 + len(alone) + joint)
        for candidate in alone:
            self.measure(candidate, bar, task)
        best = [max(grid[r], key=lambda s: self.worth(s.name)) for r in live]
        self.measure(tuple(best), bar, task)
        for left in range(len(best)):
            self.measure((*best[:left], *best[left + 1 :]), bar, task)
        while True:  # each round has another plan of higher utility, or of fewer rules: it ends
            chosen = self.best()
            for other in self.without(chosen).values():
                self.measure(other, bar, task)
            if self.best() == chosen:
                bar.update(task, total=len(self.rows))
                return chosen

    def without(self, name: str) -> dict[str, Candidate]:
        """A candidate with each of its rules left out."""
        whole = self.candidates[name]
        return {s.rule: tuple(o for o in whole if o is not s) for s in whole}
