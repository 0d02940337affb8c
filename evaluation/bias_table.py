"""``training bias-table``: the base, trained arms and controls on the same held-out problems (core.md §4.3, §4.4).

Controls: ``template_only``, the base with another instruction; ``first_token``, the base with the first token that the
trained vectors would write (core.md §4.5), of several the one that does best on validation problems. A run with random
rewards is an arm like any other. Each (arm, temperature) is a file, so a kill costs one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json, write_json, write_text
from neureasoner.errors import UserError
from neureasoner.evaluation.cells import header, interval, row
from neureasoner.evaluation.metrics import Outcome, compare, split_by, summarise
from neureasoner.model_files import model_files
from neureasoner.stages import MARK, StageFolder
from neureasoner.traces import Problem
from neureasoner.training.bias import DIRECTION, MODEL
from neureasoner.training.bias_config import QUESTION, BiasTableConfig

BASE, TEMPLATE, FIRST = "base", "template_only", "first_token"
COSTS = ("trained_parameters", "optimizer_bytes", "learning_rate", "steps")


@dataclass(frozen=True)
class Arm:
    """One row of the table. ``run``: folder of a `training bias` run, empty for the base."""

    name: str
    run: str = ""
    template: str = QUESTION
    prefix: str = ""


def _summary(run: str) -> dict[str, Any]:
    mark = Path(run) / MARK
    found = read_json(mark) if mark.is_file() else {}
    if found.get("name") != "training bias":
        raise UserError(f"{run}: not a finished `training bias` run; run it first")
    return dict(found["summary"])


@contextmanager
def arm_model(base: str, run: str, device: str) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer) of an arm: the base, the base with a run's vectors, or a run's own model.

    Raises UserError for vectors that were trained on another base.
    """
    from neureasoner.directions import Direction
    from neureasoner.models import load
    from neureasoner.training.vectors import bias_vectors

    own = Path(run) / MODEL
    model, tokenizer = load(str(own) if run and own.is_dir() else base, device=device or None)
    vectors = Path(run) / DIRECTION
    with bias_vectors(model, Direction.load(vectors)) if run and vectors.is_dir() else nullcontext():
        yield model, tokenizer


def first_tokens(model: Any, tokenizer: Any, problems: Sequence[Problem], template: str, k: int) -> list[str]:
    """The ``k`` tokens likeliest to begin a response, by their mean probability over ``problems``; special ones not."""
    import torch

    from neureasoner.caches import new_cache
    from neureasoner.forward import next_logits
    from neureasoner.models import input_device
    from neureasoner.prompts import encode_text
    from neureasoner.sampling import left_padded, pad_id
    from neureasoner.training.policy_measure import prompt_of

    prompts = [encode_text(tokenizer, prompt_of(tokenizer, p, template)) for p in problems]
    device = input_device(model)
    total = torch.zeros(model.config.vocab_size, device=device)
    for start in range(0, len(prompts), 32):
        ids, mask = left_padded(prompts[start : start + 32], pad_id(tokenizer), device)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            total += next_logits(model, ids, mask, position, new_cache(model)).to(device).softmax(-1).sum(0)
    total[list(tokenizer.all_special_ids)] = 0
    return [tokenizer.decode([i]) for i in total[: len(tokenizer)].topk(k).indices.tolist()]


def _outcome(row: Mapping[str, Any]) -> Outcome:
    return Outcome(
        row["problem"],
        row["family"],
        row["difficulty"],
        row["sample"],
        row["correct"],
        float(row["tokens"]),
        truncated=float(row["truncated"]),
    )


class Table:
    """All measurements of one table; each is read from its file if it is there."""

    def __init__(self, config: BiasTableConfig, parts: Path):
        self.config, self.parts = config, parts

    def answers(self, arm: Arm, problems: Sequence[Problem], temperature: float, tag: str = "test") -> list[Outcome]:
        """The arm's outcomes on ``problems``. ``tag`` and the arm's name make the file's name."""
        file = self.parts / f"{tag}-{arm.name}-{temperature:g}.json"
        if not file.is_file():
            with arm_model(self.config.model, arm.run, self.config.device) as (model, tokenizer):
                write_json(file, self._measure(model, tokenizer, arm, problems, temperature, tag))
        return [_outcome(row) for row in read_json(file)]

    def _measure(
        self, model: Any, tokenizer: Any, arm: Arm, problems: Sequence[Problem], temperature: float, tag: str
    ) -> list[dict[str, Any]]:
        from neureasoner.training.policy_measure import measure

        samples = self.config.samples if temperature else 1  # greedy answers are all alike
        with _progress(f"{tag}: {arm.name}, temperature {temperature:g}", len(problems) * samples) as advance:
            answered = measure(
                model,
                tokenizer,
                problems,
                samples=samples,
                temperature=temperature,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                template=arm.template,
                prefix=arm.prefix,
                answer=self.config.answer,
                advance=advance,
            )
        return [asdict(a) for a in answered]

    def choose_prefix(self, run: str, problems: Sequence[Problem]) -> dict[str, Any]:
        """``{"chosen": text, "validation": {text: accuracy}}`` of the first tokens that the run's model likes best."""
        config, temperature = self.config, self.config.temperatures[0]
        with arm_model(config.model, run, config.device) as (model, tokenizer):
            tokens = first_tokens(model, tokenizer, problems, config.template, config.prefixes)
        tried = {}
        for number, token in enumerate(tokens):
            arm = Arm(f"prefix{number}", template=config.template, prefix=token)
            outcomes = self.answers(arm, problems, temperature, "validation")
            tried[token] = sum(o.correct for o in outcomes) / len(outcomes)
        return {"chosen": max(tried, key=lambda t: tried[t]), "validation": {t: round(v, 4) for t, v in tried.items()}}


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from neureasoner.progress import Progress

    with Progress() as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.update(task, advance=n)


def figures(outcomes: Sequence[Outcome], base: Sequence[Outcome] | None, resamples: int) -> dict[str, Any]:
    """Accuracy and tokens with intervals, by family too, the share cut off, and the paired difference to the base."""
    row = summarise(outcomes, resamples)
    row["truncated"] = sum(o.truncated for o in outcomes) / len(outcomes)
    row["families"] = split_by(outcomes, lambda o: o.family, resamples=resamples)
    if base is not None:
        row["against_base"] = compare(outcomes, base, resamples)
    return row


def bias_table(config: BiasTableConfig) -> dict[str, Any]:
    """Stage ``training bias-table``. Writes results.json, table.md and accuracy.png."""
    from neureasoner.training.policy_measure import choose_problems
    from neureasoner.training.rewards import check_gold

    runs = {name: _summary(run) for name, run in config.arms.items()}
    given = [config.problems, *([config.validation] if config.validation else [])]
    marks = [str(Path(run) / MARK) for run in config.arms.values()]
    folder = StageFolder(config.out, "training bias-table", config, inputs=[*given, *marks, *model_files(config.model)])
    if folder.done:
        return folder.summary
    problems = choose_problems(config.problems, config.kinds, config.limit)
    check_gold(problems, config.answer)
    table = Table(config, folder.path / "parts")
    arms = [Arm(BASE, template=config.template)]
    if config.control_template:
        arms.append(Arm(TEMPLATE, template=config.control_template))
    prefix = None
    trained = [run for name, run in config.arms.items() if runs[name]["arm"] == "vectors"]
    if config.prefixes:
        if not trained:
            raise UserError("key 'prefixes': no arm trains vectors, whose first tokens are tried; set it to 0")
        held = choose_problems(config.validation, config.kinds, config.limit)
        prefix = table.choose_prefix(trained[0], held)
        arms.append(Arm(FIRST, template=config.template, prefix=prefix["chosen"]))
    arms += [Arm(name, run, config.template) for name, run in config.arms.items()]
    results: dict[str, Any] = {"problems": len(problems), "prefix": prefix, "arms": {}}
    for arm in arms:
        summary = runs.get(arm.name, {})
        row: dict[str, Any] = {"prefix": arm.prefix, "template": arm.template, "temperatures": {}}
        row |= {key: summary.get(key) for key in COSTS} | {"seconds": summary.get("seconds")}
        for temperature in config.temperatures:
            base = None if arm.name == BASE else table.answers(arms[0], problems, temperature)
            found = figures(table.answers(arm, problems, temperature), base, config.resamples)
            row["temperatures"][f"{temperature:g}"] = found
        results["arms"][arm.name] = row
    write_json(folder.path / "results.json", results)
    write_text(folder.path / "table.md", markdown(results))
    plot(results, folder.path / "accuracy.png")
    print(markdown(results))
    return folder.finish(
        {
            "problems": len(problems),
            "accuracy": {
                name: {t: round(f["accuracy"], 4) for t, f in row["temperatures"].items()}
                for name, row in results["arms"].items()
            },
        }
    )


def _bytes(n: int | None) -> str:
    if n is None:
        return "–"
    for unit, size in (("MB", 1 << 20), ("KB", 1 << 10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def markdown(results: Mapping[str, Any]) -> str:
    """What the arms cost, and for each temperature what they win."""
    lines = header("arm", "trained parameters", "optimiser memory", "rate", "updates", "s per update", "of it sampling")
    for name, arm in results["arms"].items():
        if arm["steps"] is None:
            continue
        seconds = arm["seconds"] or {"step": float("nan"), "sampling": float("nan")}
        cells = [name, f"{arm['trained_parameters']:,}", _bytes(arm["optimizer_bytes"]), f"{arm['learning_rate']:g}"]
        lines.append(row(*cells, str(arm["steps"]), f"{seconds['step']:.1f}", f"{seconds['sampling']:.1f}"))
    for temperature, base in results["arms"][BASE]["temperatures"].items():
        how = "greedy" if float(temperature) == 0 else f"temperature {temperature}"
        said = f"{results['problems']} held-out problems, {how}; 95 % intervals and paired differences by problem:"
        families = list(base["families"])
        heads = ("arm", "accuracy, %", "against base, points", "mean tokens", "cut off, %", *families)
        lines += ["", said, "", *header(*heads)]
        for name, arm in results["arms"].items():
            found = arm["temperatures"][temperature]
            pair = found.get("against_base")
            cells = [name + (f" ({arm['prefix']!r})" if arm["prefix"] else "")]
            cells.append(interval(found["accuracy"], found["accuracy_ci"]))
            cells.append(interval(pair["accuracy_delta"], pair["accuracy_delta_ci"], sign="+") if pair else "–")
            cells += [f"{found['tokens_mean']:.0f}", f"{100 * found['truncated']:.1f}"]
            lines.append(row(*cells, *(f"{100 * found['families'][f]['accuracy']:.1f}" for f in families)))
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy of every arm with its interval, one panel a temperature."""
    from matplotlib.figure import Figure

    names = list(results["arms"])
    temperatures = list(results["arms"][BASE]["temperatures"])
    figure: Any = Figure(figsize=(0.5 + 3.6 * len(temperatures), 0.9 + 0.36 * len(names)), layout="constrained")
    for i, temperature in enumerate(temperatures):
        axes = figure.add_subplot(1, len(temperatures), i + 1)
        rows = [results["arms"][n]["temperatures"][temperature] for n in names]
        for y, (name, found) in enumerate(zip(names, rows, strict=True)):
            low, high = (100 * v for v in found["accuracy_ci"])
            colour = "0.35" if name in (BASE, TEMPLATE, FIRST) else "C0"
            axes.plot([low, high], [y, y], color=colour, linewidth=2)
            axes.plot([100 * found["accuracy"]], [y], "o", color=colour)
        axes.axvline(100 * rows[0]["accuracy"], color="0.7", linewidth=1, linestyle="--", zorder=0)
        axes.set(yticks=range(len(names)), yticklabels=names if i == 0 else [], ylim=(len(names) - 0.5, -0.5))
        axes.set(xlabel="right answers, %", title="greedy" if float(temperature) == 0 else f"temperature {temperature}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
