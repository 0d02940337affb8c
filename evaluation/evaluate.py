"""``evaluate``: every arm on the same problems, then results, a report and a short table. Goes on after a kill.

The problems are the generators' (judged exactly) or a benchmark's (its final answers graded). A share of the work can
be done by itself (``shard``): it writes parts and nothing else, and a run without one puts all parts together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neureasoner.artifacts import file_fingerprint, read_json, write_json, write_text
from neureasoner.data_builders.asking import FREE
from neureasoner.data_builders.families import FAMILIES
from neureasoner.data_builders.grading.verifier import MathVerifier
from neureasoner.errors import UserError
from neureasoner.evaluation import results as results_of
from neureasoner.evaluation.arms import (
    FAMILY_CLOSING,
    FULL,
    NO_THINKING,
    VANILLA,
    Arm,
    as_baseline,
    baseline_settings,
    choose,
    closed_share,
    controls_of,
    measured_rates,
    thinking_of,
    votes,
    with_rules,
)
from neureasoner.evaluation.closings import CLOSING, closing_rates, coins
from neureasoner.evaluation.config import MERGE, EvaluateConfig, parse_shard, shard_of_launch
from neureasoner.evaluation.markdown import markdown
from neureasoner.evaluation.metrics import Outcome, per_problem
from neureasoner.evaluation.oracle import ExactOracles
from neureasoner.evaluation.problems import capped, containment, gradable_problems, is_program
from neureasoner.evaluation.ready import check_ready, check_thinking
from neureasoner.evaluation.runner import ArmRun, outcomes
from neureasoner.evaluation.store import listed
from neureasoner.model_files import model_files, resolve
from neureasoner.stages import StageFolder
from neureasoner.traces import Problem, Trace, read_traces

if TYPE_CHECKING:
    from neureasoner.progress import Progress

CARD, PLAN = "neureasoner.json", "plan.yaml"
APART = ("shard", "device", "report_traces", "details", "show_examples")  # settings that no sample depends on


class Evaluation:
    """What the arms share: problems, models loaded once and only if needed, and the numbers arms take from others."""

    def __init__(self, config: EvaluateConfig, problems: list[Problem], base: str):
        self.config, self.base = config, base
        # Neighbours of like length waste the least padding: a batch runs until its longest response ends.
        self.problems = sorted(problems, key=lambda p: (p.family, p.difficulty))
        self.outcomes: dict[str, list[Outcome]] = {}
        self.extras: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}
        self._thinking: float | None = None

    def model(self, kind: str) -> Any:
        """``steered`` or ``base`` as a SteeredModel; ``served``: the base, by a server if there is one."""
        from neureasoner.inference.plan import Plan
        from neureasoner.inference.steered import SteeredModel
        from neureasoner.models import load

        if kind not in self._loaded:
            device = self.config.device or None
            if kind == "steered":
                self._loaded[kind] = SteeredModel.from_pretrained(self.config.model, device=device)
            elif kind == "served" and not self.config.endpoint:
                return self.model("base")
            elif kind == "served":
                from neureasoner.evaluation.served import Served

                self._loaded[kind] = Served(self.config.endpoint, self.config.out, self.base)
            else:
                self._loaded[kind] = SteeredModel(*load(self.base, device=device), Plan("none"))
        return self._loaded[kind]

    def tokens(self, arm: str) -> float:
        """Mean tokens of an arm that has run."""
        return float(per_problem(self.outcomes[arm]).tokens.mean())

    def rates(self) -> dict[str, float]:
        """The coins of ``random_trigger``, measured on full's traces and kept."""
        return self._kept("rates.json", measured_rates)

    def closings(self) -> dict[str, Any]:
        """At which rates full closed thinkings, measured on its traces and kept."""
        return self._kept("closings.json", closing_rates)

    def _kept(self, name: str, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` finds in full's traces under its plan; measured once, so that a resumed run has the same."""
        file = Path(self.config.out) / name
        if not file.is_file():
            steered = self.model("steered")
            write_json(file, measure(self._traces(FULL), steered.plan, steered.tokenizer))
        return dict(read_json(file))

    def _traces(self, arm: str) -> list[Trace]:
        """The traces of an arm that has run."""
        return read_traces(Path(self.config.out) / "traces" / f"{arm}.jsonl")

    def thinking(self) -> float:
        """Mean thinking tokens of vanilla, which has run."""
        if self._thinking is None:
            self._thinking = thinking_of(self._traces(VANILLA))
        return self._thinking

    def closed(self) -> float:
        """Share of full's responses whose thinking was closed at once; full has run."""
        return closed_share(self._traces(FULL))

    def run_of(self, arm: Arm) -> ArmRun:
        """An arm made ready; takes its numbers from the arms that have run."""
        k, rates = 1, None
        if arm.vote:
            k = votes(self.tokens(FULL), self.tokens(NO_THINKING))
            self.extras["votes"] = {"k": k, "full_tokens": self.tokens(FULL), "answer_tokens": self.tokens(NO_THINKING)}
        if arm.trigger == "random":
            rates = self.extras["random_rates"] = self.rates()

        settings: dict[str, Any] = {}
        if arm.baseline:
            thinking = self.thinking() if VANILLA in arm.needs else 0.0
            settings = baseline_settings(arm, self.problems, thinking, self.closed() if FULL in arm.needs else 0.0)
            self.extras.setdefault("baselines", {})[arm.name] = settings

        def load() -> Any:
            if arm.plain:
                return self.model("served")
            model = self.model(arm.model)
            return as_baseline(model, arm, settings) if arm.baseline else with_rules(model, arm, rates)

        oracles = None
        if arm.trigger == "oracle":
            oracles = lambda: ExactOracles().functions()  # noqa: E731
        elif arm.trigger == "rates":
            closings = self.extras["closings"] = self.closings()
            closing = closings["by_family" if arm.name == FAMILY_CLOSING else "pooled"]
            oracles = lambda: coins(closing, self.model("steered").plan.rule(CLOSING))  # noqa: E731
        return ArmRun(arm, load, self.config, self.problems, k, oracles)


def _card(model: str) -> dict[str, Any] | None:
    """What a steered checkpoint says of itself; None for a plain model."""
    folder = Path(resolve(model))
    if not (folder / PLAN).is_file():
        return None
    return dict(read_json(folder / CARD)) if (folder / CARD).is_file() else {}


def _base(config: EvaluateConfig, card: dict[str, Any] | None) -> str:
    """The vanilla model. Raises UserError where it is not the one the checkpoint was trained from."""
    if card is None:
        if config.base not in ("", config.model):
            raise UserError(f"{config.model}: is a plain model and its own base; leave out --base {config.base}")
        return config.model
    base = config.base or str(card.get("base") or "")
    if base and not config.base and card.get("base_files") not in (None, file_fingerprint(model_files(base))):
        raise UserError(
            f"{config.model}: was trained from another '{base}' than the one that is here now; train and assemble again"
        )
    return base


def _of_launch(config: EvaluateConfig) -> EvaluateConfig:
    """Under ``accelerate launch`` or ``torchrun`` each process does its own share, on a GPU of its own."""
    shard = "" if config.shard else shard_of_launch(os.environ)
    if not shard:
        return config
    import torch

    gpus, rank = torch.cuda.device_count(), os.environ.get("LOCAL_RANK", "")
    device = config.device or (f"cuda:{int(rank) % gpus}" if gpus and rank.isdecimal() else "")
    return replace(config, shard=shard, device=device)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Stage ``evaluate``. Writes results.json and .md, traces/<arm>.jsonl, figures/ and report.html; prints a table.

    With a shard (of ``config``, or of the launch that this process is one of) only parts are written, and the summary
    says what was done. Raises UserError, before anything is generated, for an unknown arm, a bad problem file, problems
    that cannot be graded here, arms that the model cannot run, or a file that an arm lacks.
    """
    from neureasoner.inference.plan import Plan

    config = _of_launch(config)
    card = _card(config.model)
    if card is None and not config.arms:
        raise UserError(
            f"{config.model}: holds no {PLAN}, so it is no steered checkpoint; run `neureasoner assemble` first, or "
            "name the arms that need none (--arms vanilla)"
        )
    problems = gradable_problems(config.problems, config.limit)
    exact = all(p.family in FAMILIES for p in problems)
    config = capped(config, problems)
    model = Path(resolve(config.model))
    plan = Plan("none") if card is None else Plan.load(model)
    arms, skipped = choose(
        config.arms,
        plan.names,
        (model / "probes" / "paper").is_dir(),
        plain=card is None,
        exact=exact,
        votable=not any(map(is_program, problems)),
        controls=controls_of(plan),
    )
    base = _base(config, card)
    if not base and any(a.model == "base" for a in arms):
        raise UserError(f"{config.model}: names no base model; give --base (the model before training, such as tiny)")
    if card is None or any(a.baseline for a in arms):
        check_thinking(base, arms)
    if any(a.baseline == "think_or_not" for a in arms):
        MathVerifier()  # tells whether two answers are one; raises where math-verify is missing
    if config.endpoint and not any(a.plain for a in arms):
        raise UserError("key 'endpoint' serves arms that need no hooks, and there is none among them; leave it out")
    checkpoint = [model / name for name in (PLAN, CARD, "stage.json")]
    given = [p for p in (config.probes_results, config.neurons, config.judge_results) if p]
    # a share is a share of the same work; neither where it is done, how fast a server is asked, nor what is shown of it
    # changes an answer
    endpoint = {k: v for k, v in config.endpoint.items() if k not in FREE}
    free: dict[str, Any] = {name: getattr(EvaluateConfig, name) for name in APART}
    folder = StageFolder(
        config.out,
        "evaluate",
        replace(config, endpoint=endpoint, **free),
        inputs=[config.problems, *(p for p in checkpoint if p.is_file()), *given, *(model_files(base) if base else [])],
    )
    if not folder.done:
        check_ready(config.model, base, arms)
        evaluation = Evaluation(config, problems, base)
        evaluation.extras |= containment(config.out, problems)
        shared = _run(evaluation, arms, skipped)
        if config.shard and config.shard != MERGE:
            return shared
        _write(evaluation, skipped)
    from neureasoner.evaluation.show import show

    if config.show_examples:
        both = {FULL, VANILLA} <= {a.name for a in arms}
        show(config.out, config.show_examples if both else 0)
    return folder.summary if folder.done else folder.finish(_short(read_json(folder.path / "results.json")))


def _run(evaluation: Evaluation, arms: list[Arm], skipped: dict[str, str]) -> dict[str, Any]:
    """Every arm, or the share of each. Returns what a share did; raises UserError where parts are missing to merge."""
    from neureasoner.progress import Progress

    shard, left = evaluation.config.shard, dict[str, str]()
    done, waiting = 0, list(arms)
    with Progress() as bar:
        for name, reason in skipped.items():
            bar.console.print(f"[yellow]arm {name} left out: {reason}[/yellow]")
        while waiting:
            ready = [a for a in waiting if all(need in evaluation.outcomes for need in a.needs)]
            waiting = [a for a in waiting if a not in ready]
            if not ready:  # only where the work is shared
                lacks = {a.name: [need for need in a.needs if need not in evaluation.outcomes] for a in waiting}
                left |= {name: f"needs all of {', '.join(needs)}, merged" for name, needs in lacks.items()}
                break
            runs = [evaluation.run_of(a) for a in ready]
            todo = {run.arm.name: run.store.missing() for run in runs}
            for run in list(runs):
                name, missing = run.arm.name, todo[run.arm.name]
                if shard and shard != MERGE:
                    index, of = parse_shard(shard)
                    todo[name] = [job for n, job in enumerate(run.jobs) if n % of == index and job in set(missing)]
                elif missing:
                    found = f"{len(missing)} of {len(run.jobs)} parts are missing ({listed(missing)})"
                    if shard == MERGE:
                        left[name] = found
                        runs.remove(run)
                    elif len(missing) < len(run.jobs):
                        bar.console.print(f"arm {name}: {found}; they are generated now")
            done += _generate(runs, todo, bar)
            for run in runs:
                if not shard or shard == MERGE:
                    run.merge()
                if run.store.whole:
                    rows = outcomes(run.store.traces(), evaluation.config.max_new_tokens)
                    evaluation.outcomes[run.arm.name] = rows
    told = "; ".join(f"{name}: {why}" for name, why in left.items())
    if shard == MERGE and left:
        raise UserError(f"{evaluation.config.out}: not all is there to merge. {told}")
    if shard and shard != MERGE:
        print(f"shard {shard}: {done} parts done" + (f"; left for a run after --shard {MERGE}: {told}" if left else ""))
    return {"shard": shard, "parts": done, "left": left}


def _generate(runs: list[ArmRun], todo: dict[str, list[tuple[int, int]]], bar: Progress) -> int:
    """Generate parts of arms; returns how many. The same part of every arm in turn, so that a machine that is busy for
    a while slows all of them."""
    tasks, done = {}, dict[str, list[Outcome]]()
    for run in runs:
        name, n = run.arm.name, len(run.jobs)
        done[name], tasks[name] = [], bar.add_task(f"{name:<16}", total=n * run.k)
        bar.update(tasks[name], completed=(n - len(todo[name])) * run.k)
    for sample, batch in sorted({job for run in runs for job in todo[run.arm.name]}):
        for run in runs:
            name = run.arm.name
            if (sample, batch) in todo[name]:
                done[name] += outcomes(run.part(sample, batch), run.config.max_new_tokens)
                right, tokens = (
                    sum(getattr(o, k) for o in done[name]) / len(done[name]) for k in ("correct", "tokens")
                )
                bar.update(tasks[name], advance=run.k, so_far=f"{right:.1%} right, {tokens:.0f} tokens")
    return sum(len(todo[run.arm.name]) for run in runs)


def _write(evaluation: Evaluation, skipped: dict[str, str]) -> None:
    """Results, their page, and the report."""
    from neureasoner.evaluation.report import write_report
    from neureasoner.evaluation.viewer.config import DetailsConfig
    from neureasoner.evaluation.viewer.details import write_details

    config = evaluation.config
    found = results_of.build(
        config, evaluation.base, evaluation.problems, evaluation.outcomes, skipped, evaluation.extras
    )
    write_json(Path(config.out) / "results.json", found)
    write_text(Path(config.out) / "results.md", markdown(found))
    if config.details:
        write_details(DetailsConfig(config.out, config.details, device=config.device))
    write_report(config.out, config.report_traces, config.probes_results)


def _short(found: dict[str, Any]) -> dict[str, Any]:
    keys = ("accuracy", "accuracy_ci", "tokens_mean", "tokens_ci")
    return {"arms": {a["name"]: {k: a[k] for k in keys} for a in found["arms"]}, "n_problems": found["problems"]["n"]}
