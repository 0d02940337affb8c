"""``reproduce``: run a recipe, read what the stages of the kind that a table shows left behind, print ours and theirs.

A table is a recipe and a page; the label of each stage it reads is the name of the benchmark.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json, write_text
from neureasoner.commands import COMMANDS
from neureasoner.errors import UserError
from neureasoner.evaluation.reproduce.config import READS, ReproduceConfig
from neureasoner.evaluation.reproduce.paper import choose
from neureasoner.evaluation.reproduce.planned import check_planned
from neureasoner.evaluation.reproduce.tables import WRITERS, Found
from neureasoner.evaluation.results import command_line
from neureasoner.floor_config import RunConfig
from neureasoner.run import Stage, load_recipe, run_recipe

FILES = {"probes report": "report.json"}


def read_stages(table: str, recipe: str, stages: list[Stage]) -> dict[str, Stage]:
    """The stages a table reads, by label. Raises UserError if the recipe has none."""
    wanted = READS[table]
    found = {s.label: s for s in stages if s.command is COMMANDS[wanted]}
    if not found:
        raise UserError(f"recipe {recipe}: no stage `{wanted}`, which {table} is written from")
    return found


def our_model(results: dict[str, Any]) -> tuple[str, str]:
    """``(what the figures are of, what it was trained from)``; the same twice where no base is named."""
    return str(results["model"]), str(results.get("base") or results["model"])


def title(table: str, found: Found, models: list[tuple[str, str]]) -> list[str]:
    """The heading, and what the two sides are."""
    lines = [f"# {table.replace('table', 'Table ').replace('figure', 'Figure ')}", ""]
    mine = ", ".join(f"`{m}`" + (f" (trained from `{base}`)" if base != m else "") for m, base in models)
    if not found.of:
        return [*lines, f"**Another model.** Ours is {mine}; the paper does not say which model its table is of.", ""]
    if found.same:
        return [*lines, f"Ours is {mine}, the paper's {found.of}: the same model.", ""]
    return [
        *lines,
        f"**Another model.** Ours is {mine}, the paper's is {found.of}: compare signs and sizes of differences, not "
        "levels.",
        "",
    ]


def reproduce(config: ReproduceConfig) -> dict[str, Any]:
    """Command ``reproduce``. Runs what the recipe has not run yet, writes TABLE.md in its run directory, prints it.

    Raises UserError for a recipe without the stages or arms that the table shows, and for a model that the paper has no
    such figures of, before anything runs.
    """
    table = config.table
    settings = RunConfig(config.recipe or f"reproduce_{table}", config.out, config.set)
    _, run_dir, listed = load_recipe(settings)
    stages = read_stages(table, settings.recipe, listed)
    if config.paper:
        if table == "table4":
            raise UserError("key 'paper': the paper does not say which model its Table 4 is of")
        choose(table, "", config.paper)
    check_planned(table, stages, listed)
    run_recipe(settings)
    folders = {label: Path(str(s.out)) for label, s in stages.items()}
    results = {label: read_json(f / FILES.get(READS[table], "results.json")) for label, f in folders.items()}
    models = list(dict.fromkeys(our_model(r) for r in results.values()))
    of, same = ("", False) if table == "table4" else choose(table, models[0][1], config.paper)
    found = Found(results, folders, run_dir, of, same and len({base for _, base in models}) == 1)
    body = WRITERS[table](found)
    text = "\n".join([*title(table, found, models), *body, "", *sources(results)]) + "\n"
    write_text(run_dir / f"{table}.md", text)
    print(text, flush=True)
    return {"table": table, "file": str(run_dir / f"{table}.md"), "figures": found.files, "paper": of, "same": same}


def sources(results: dict[str, dict[str, Any]]) -> list[str]:
    """How it was made, one line a stage."""
    lines = []
    for label, r in results.items():
        n = r.get("problems") or r.get("split", {}).get("test", {}).get("problems")
        n = n.get("n", n.get("test")) if isinstance(n, dict) else n
        said = [f"{n} test problems"] if n else []
        samples = r.get("seeds", {}).get("samples")
        said += [f"{samples} samples each" if samples > 1 else "one sample each"] if samples else []
        if s := r.get("sampling"):
            said.append(f"temperature {s['temperature']}, top-p {s['top_p']}, at most {s['max_new_tokens']} tokens")
        lines.append(f"- {label}: {'; '.join(said)}")
    return ["Made by", "", "```", command_line(), "```", "", *lines]
