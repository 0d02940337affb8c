"""``evaluate``: every arm on the same problems, then results, a report and a short table. Goes on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neureasoner.artifacts import file_fingerprint, read_json, write_json, write_text
from neureasoner.data_builders.families import family
from neureasoner.errors import UserError
from neureasoner.evaluation import results as results_of
from neureasoner.evaluation.arms import FULL, NO_THINKING, Arm, choose, measured_rates, votes, with_rules
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.markdown import markdown
from neureasoner.evaluation.metrics import Outcome, per_problem
from neureasoner.evaluation.runner import ArmRun, outcomes
from neureasoner.model_files import model_files
from neureasoner.stages import StageFolder
from neureasoner.traces import Problem, read_problems, read_traces

CARD, PLAN = "neureasoner.json", "plan.yaml"


class Evaluation:
    """What the arms share: problems, models loaded once and only if needed, and the numbers arms take from others."""

    def __init__(self, config: EvaluateConfig, problems: list[Problem], base: str):
        self.config, self.base = config, base
        # Neighbours of like length waste the least padding: a batch runs until its longest response ends.
        self.problems = sorted(problems, key=lambda p: (p.family, p.difficulty))
        self.outcomes: dict[str, list[Outcome]] = {}
        self.extras: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}

    def model(self, kind: str) -> Any:
        """``steered`` or ``base`` as a SteeredModel."""
        from neureasoner.inference.plan import Plan
        from neureasoner.inference.steered import SteeredModel
        from neureasoner.models import load

        if kind not in self._loaded:
            device = self.config.device or None
            if kind == "steered":
                self._loaded[kind] = SteeredModel.from_pretrained(self.config.model, device=device)
            else:
                self._loaded[kind] = SteeredModel(*load(self.base, device=device), Plan("none"))
        return self._loaded[kind]

    def tokens(self, arm: str) -> float:
        """Mean tokens of an arm that has run."""
        return float(per_problem(self.outcomes[arm]).tokens.mean())

    def rates(self) -> dict[str, float]:
        """The coins of ``random_trigger``, measured on full's traces and kept."""
        file = Path(self.config.out) / "rates.json"
        if not file.is_file():
            steered = self.model("steered")
            full = read_traces(Path(self.config.out) / "traces" / f"{FULL}.jsonl")
            write_json(file, measured_rates(full, steered.plan, steered.tokenizer))
        return dict(read_json(file))

    def run_of(self, arm: Arm) -> ArmRun:
        """An arm made ready; takes its numbers from the arms that have run."""
        k, rates = 1, None
        if arm.vote:
            k = votes(self.tokens(FULL), self.tokens(NO_THINKING))
            self.extras["votes"] = {"k": k, "full_tokens": self.tokens(FULL), "answer_tokens": self.tokens(NO_THINKING)}
        if arm.trigger == "random":
            rates = self.extras["random_rates"] = self.rates()

        def load() -> Any:
            model = self.model(arm.model)
            return with_rules(model, arm, rates) if arm.model == "steered" else model

        return ArmRun(arm, load, self.config, self.problems, k)


def _card(model: str) -> dict[str, Any]:
    folder = Path(model)
    if not (folder / PLAN).is_file():
        raise UserError(f"{model}: holds no {PLAN}, so it is no steered checkpoint; run `neureasoner assemble` first")
    return dict(read_json(folder / CARD)) if (folder / CARD).is_file() else {}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Stage ``evaluate``. Writes results.json and .md, traces/<arm>.jsonl, figures/ and report.html; prints a table.

    Raises UserError for an unknown arm, a bad problem file, or a folder that is no steered checkpoint.
    """
    from neureasoner.inference.plan import Plan

    card = _card(config.model)
    problems = read_problems(config.problems)[: config.limit or None]
    for p in problems:
        family(p.family)
    plan = Plan.load(config.model)
    paper = (Path(config.model) / "probes" / "paper").is_dir()
    arms, skipped = choose(config.arms, plan.names, paper)
    base = config.base or str(card.get("base") or "")
    if base and not config.base and card.get("base_files") not in (None, file_fingerprint(model_files(base))):
        raise UserError(
            f"{config.model}: was trained from another '{base}' than the one that is here now; train and assemble again"
        )
    if not base and any(a.model == "base" for a in arms):
        raise UserError(f"{config.model}: names no base model; give --base (the model before training, such as tiny)")
    checkpoint = [Path(config.model) / name for name in (PLAN, CARD, "stage.json")]
    given = [p for p in (config.probes_results, config.neurons, config.judge_results) if p]
    folder = StageFolder(
        config.out,
        "evaluate",
        config,
        inputs=[config.problems, *(p for p in checkpoint if p.is_file()), *given, *(model_files(base) if base else [])],
    )
    if not folder.done:
        _run(Evaluation(config, problems, base), arms, skipped)
    from neureasoner.evaluation.show import show

    if config.show_examples:
        show(config.out, config.show_examples)
    return folder.summary if folder.done else folder.finish(_short(read_json(folder.path / "results.json")))


def _run(evaluation: Evaluation, arms: list[Arm], skipped: dict[str, str]) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from neureasoner.evaluation.report import write_report
    from neureasoner.evaluation.viewer.config import DetailsConfig
    from neureasoner.evaluation.viewer.details import write_details

    config = evaluation.config
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[so_far]}"),
    )
    with Progress(*columns) as bar:
        for name, reason in skipped.items():
            bar.console.print(f"[yellow]arm {name} left out: {reason}[/yellow]")
        for arm in arms:
            run = evaluation.run_of(arm)
            task = bar.add_task(f"{arm.name:<16}", total=len(run.jobs) * run.k, so_far="")
            done: list[Outcome] = []
            if not run.file.is_file():
                for sample, batch in run.jobs:
                    done += outcomes(run.part(sample, batch), config.max_new_tokens)
                    right, tokens = (sum(getattr(o, k) for o in done) / len(done) for k in ("correct", "tokens"))
                    bar.update(task, advance=run.k, so_far=f"{right:.1%} right, {tokens:.0f} tokens")
                run.merge()
            evaluation.outcomes[arm.name] = outcomes(read_traces(run.file), config.max_new_tokens)
            table = per_problem(evaluation.outcomes[arm.name])
            so_far = f"{table.accuracy.mean():.1%} right, {table.tokens.mean():.0f} tokens"
            bar.update(task, completed=len(run.jobs) * run.k, so_far=so_far)
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
