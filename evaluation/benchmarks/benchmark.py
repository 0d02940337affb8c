"""``evaluation benchmark``: the problems of a benchmark as a problem file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neureasoner.data_builders.sources.readers import input_files, is_hub
from neureasoner.evaluation.benchmarks.config import BenchmarkConfig
from neureasoner.evaluation.benchmarks.load import benchmark_of, load_problems, release_of
from neureasoner.stages import StageFolder
from neureasoner.traces import write_rows


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Stage ``evaluation benchmark``. Writes problems.jsonl; its summary states source, release, seed and template."""
    chosen = benchmark_of(config)
    release = release_of(config, chosen)
    local: list[Path] = [] if not config.input or is_hub(config.input) else input_files(config.input)
    folder = StageFolder(config.out, "evaluation benchmark", config, inputs=local)
    if folder.done:
        return folder.summary
    problems = load_problems(config)
    write_rows(folder.path / "problems.jsonl", problems)
    summary: dict[str, Any] = {
        "benchmark": chosen.name,
        "kind": chosen.kind,
        "n": len(problems),
        "source": config.input or f"hub:{chosen.hub}",
        "template": chosen.ask,
    }
    if chosen.size and len(problems) != chosen.size:
        summary["whole_set"] = chosen.size
    if release:
        summary["release"] = release
    if chosen.kind == "option":
        summary["options_seed"] = config.seed
    if chosen.private:
        summary["private"] = "its authors ask that no item be shown in public: publish no problems, traces or reports"
    return folder.finish(summary)
