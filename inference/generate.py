"""``generate``: answer questions with a steered checkpoint and show, in colour, where it stepped in."""

from __future__ import annotations

from itertools import groupby, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from neureasoner.inference.assemble import CARD
from neureasoner.inference.config import GenerateConfig
from neureasoner.inference.decode import Generation
from neureasoner.inference.plan import Plan, find_plan
from neureasoner.inference.steered import SteeredModel
from neureasoner.prompts import encode_prompt
from neureasoner.stages import StageFolder
from neureasoner.steps import Separators
from neureasoner.thinking import opens_thinking
from neureasoner.traces import Problem, read_problems, write_rows

FORCED, SHOWN = "bold white on magenta", 20


def rendered(generation: Generation, tokenizer: Any) -> Text:
    """The response with forced tokens marked and the thinking dimmed."""
    text, offsets = Separators.of(tokenizer).offsets(generation.response_ids)
    styled = Text(text)
    styled.stylize("dim", 0, offsets[generation.thinking_tokens])
    position = 0
    for forced, run in groupby(generation.forced):
        end = position + len(list(run))
        if forced:
            styled.stylize(FORCED, offsets[position], offsets[end])
        position = end
    return styled


def describe(event: dict[str, Any]) -> str:
    """One line about an event."""
    what = "suppressed" if event["suppressed"] else f"forced {event['action']!r}"
    if "strength" in event:
        what = f"{event['action']} of strength {event['strength']:g} on {event['tokens']} tokens"
    score = f"score {event['score']:.2f} > {event['threshold']:.2f}"
    place = f"after step {event['step'] + 1} (token {event['token']})" if event["token"] else "from the start"
    return f"{place}: {event['rule']}, {score}, {what}"


def show(console: Console, question: str, generation: Generation, tokenizer: Any, streamed: bool = False) -> None:
    """Print a response and its events; a streamed one is on the screen already."""
    if not streamed:
        console.print(Text(question, style="bold cyan"))
        console.print(rendered(generation, tokenizer))
    for event in generation.events:
        console.print(Text("  " + describe(event), style="magenta"))
    ids = generation.response_ids
    end = "finished" if generation.finished else "cut off"
    console.print(
        f"[dim]{len(ids)} tokens ({sum(generation.forced)} forced, {generation.thinking_tokens} thinking), "
        f"{len(generation.steps)} steps, {generation.triggers} interventions, {end}, {generation.seconds:.1f} s[/dim]\n"
    )


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Stage ``generate``. Prints responses; writes traces.jsonl when ``out`` is given."""
    console = Console(highlight=False)
    problems = _problems(config)
    folder = None
    if config.out:
        card = Path(config.model) / CARD
        inputs: list[str | Path] = [config.problems] if config.problems else []
        inputs += [find_plan(config.plan)] if config.plan else []
        inputs += ([card] if card.is_file() else []) + (Plan.load(config.plan).files if config.plan else [])
        folder = StageFolder(config.out, "generate", config, inputs=inputs)
        if folder.done:
            console.print(f"{config.out} is done already; nothing to do", soft_wrap=True)
            return folder.summary
    steered = SteeredModel.from_pretrained(
        config.model,
        config.plan or None,
        device=config.device or None,
        dtype=config.dtype or None,
        device_map=config.device_map or None,
    )
    if config.rules:
        steered = steered.with_plan(
            Plan("none", folder=steered.plan.folder) if config.rules == ["none"] else steered.plan.select(config.rules)
        )
    idle = [r.name for r in steered.plan.rules if r.evaluated or r.source == "boundary" or r.trigger.phase == "think"]
    first = encode_prompt(
        steered.tokenizer, problems[0], config.nothinking, config.system or None, config.chat_template_kwargs
    )
    if idle and not opens_thinking(first, steered.tokenizer):
        console.print(f"[dim]the thinking is closed in the prompt, so these rules see nothing: {', '.join(idle)}[/dim]")
    jobs = [(p, s) for p in problems for s in range(config.samples)]
    streamed = config.stream and len(jobs) == 1
    if streamed:
        console.print(Text(problems[0].question, style="bold cyan"))
    with _progress(console, len(jobs), streamed) as advance:
        done = steered.generate(
            [p for p, _ in jobs],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            system=config.system or None,
            chat_template_kwargs=config.chat_template_kwargs,
            seed=config.seed,
            batch_size=config.batch_size,
            nothinking=config.nothinking,
            on_text=(lambda text, f: console.print(Text(text, style=FORCED if f else ""), end=""))
            if streamed
            else None,
            progress=advance,
        )
    if streamed:
        console.print()
    for (problem, _), generation in list(zip(jobs, done, strict=True))[:SHOWN]:
        show(console, problem.question, generation, steered.tokenizer, streamed)
    if len(jobs) > SHOWN:
        where = f"; all are in {config.out}/traces.jsonl" if config.out else ""
        console.print(f"{SHOWN} of {len(jobs)} responses shown{where}")
    tokens = sum(len(g.response_ids) for g in done)
    summary = {
        "n": len(done),
        "tokens_mean": round(tokens / len(done), 2),
        "forced_tokens": sum(sum(g.forced) for g in done),
        "triggers_per_trace": round(sum(g.triggers for g in done) / len(done), 4),
        "finished": sum(g.finished for g in done),
    }
    if folder is None:
        return summary
    traces = (
        g.to_trace(f"{p.id}#{s}", p, seed=config.seed, plan=steered.plan.to_dict(), scores=g.scores)
        for (p, s), g in zip(jobs, done, strict=True)
    )
    write_rows(folder.path / "traces.jsonl", traces)
    return folder.finish(summary)


def _problems(config: GenerateConfig) -> list[Problem]:
    if config.problems:
        return list(islice(read_problems(Path(config.problems)), config.limit or None))
    return [Problem(f"prompt-{i}", "prompt", 1, text, "") for i, text in enumerate(config.prompt)]


class _progress:
    """A progress bar for batches; silent while a response is streamed."""

    def __init__(self, console: Console, total: int, silent: bool):
        from neureasoner.progress import Progress

        self.bar = Progress(console=console, transient=True, disable=silent)
        self.total = total

    def __enter__(self) -> Any:
        self.bar.start()
        task = self.bar.add_task("generating", total=self.total)
        return lambda done, total: self.bar.update(task, completed=done)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
