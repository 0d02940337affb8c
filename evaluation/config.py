"""Settings of the evaluation. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neureasoner.config import check_numbers
from neureasoner.errors import UserError

# What the paper decodes with (core.md §1.11); a benchmark is evaluated so unless told otherwise.
PAPER: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 16_000, "samples": 5}
CAP = 512  # for the generators' problems
CAP_HELP = (  # what ``problems.capped`` does
    f"cap; a response that reaches it is wrong and costs it; 0 = {PAPER['max_new_tokens']} for a benchmark (the "
    f"paper's), {CAP} for the generators' problems"
)
MERGE = "merge"
ENDPOINT_OURS = ("temperature", "max_tokens", "effort", "structured", "retries")


def parse_shard(text: str) -> tuple[int, int]:
    """``0/4`` -> (0, 4); nothing -> (0, 1). Raises UserError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"key 'shard' must look like 0/4 (from 0/4 to 3/4), or be '{MERGE}', got '{text}'")
    return int(found[1]), int(found[2])


def shard_of_launch(environ: Mapping[str, str]) -> str:
    """This process's share under ``accelerate launch`` or ``torchrun``, which set RANK and WORLD_SIZE: ``0/4``.

    Nothing where there is one process. Raises UserError for a number of processes without a rank.
    """
    size, rank = environ.get("WORLD_SIZE", ""), environ.get("RANK", "")
    if not size.isdecimal() or int(size) < 2:
        return ""
    if not rank.isdecimal() or int(rank) >= int(size):
        raise UserError(
            f"the environment says WORLD_SIZE={size}, but RANK is '{rank}', so this process's share is not known; give "
            "--shard, or unset WORLD_SIZE"
        )
    return f"{int(rank)}/{int(size)}"


@dataclass
class EvaluateConfig:
    """Run every arm on the same problems with paired seeds and write results, traces and a report."""

    model: str = field(metadata={"help": "steered checkpoint, or a plain model for arms that need none"})
    problems: str = field(metadata={"help": "problem file (jsonl: id, family, difficulty, question, answer)"})
    out: str = field(metadata={"help": "folder for results.json, traces/, figures/ and report.html"})
    arms: list[str] = field(
        default_factory=list, metadata={"help": "arms to run, comma separated; none = all but the baselines"}
    )
    samples: int = field(default=1, metadata={"help": "responses per problem and arm"})
    seed: int = field(default=0, metadata={"help": "first seed; sample s of batch b has the same seed in every arm"})
    max_new_tokens: int = field(default=0, metadata={"help": CAP_HELP})
    temperature: float = field(default=0.6, metadata={"help": "sampling temperature (0 = greedy)"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus of the sampling"})
    batch_size: int = field(default=32, metadata={"help": "responses decoded together (also the unit of resuming)"})
    limit: int = field(default=0, metadata={"help": "use only the first so many problems; 0 = all"})
    base: str = field(default="", metadata={"help": "vanilla model; empty = the base named in neureasoner.json"})
    resamples: int = field(default=10_000, metadata={"help": "bootstrap resamples behind each interval"})
    shard: str = field(
        default="",
        metadata={
            "help": "do this share of the work only, as in 0/4; without it all parts are merged, and what is missing "
            f"is named and done; '{MERGE}' = named only; empty under accelerate launch or torchrun = the process's own"
        },
    )
    endpoint: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "draw arms that need no hooks from a server: model=NAME,base_url=http://host:8000/v1"},
    )
    device: str = field(default="", metadata={"help": "torch device; empty = GPU if there is one"})
    probes_results: str = field(default="", metadata={"help": "results.json of `probes fit`, shown in the report"})
    neurons: str = field(default="", metadata={"help": "neurons.json of `probes locate`, shown in the report"})
    judge_results: str = field(default="", metadata={"help": "summary.json of `data judge`, shown in the report"})
    report_traces: int = field(default=600, metadata={"help": "most traces embedded in report.html"})
    details: int = field(default=0, metadata={"help": "traces whose neurons are recorded for the report; 0 = none"})
    show_examples: int = field(default=3, metadata={"help": "repaired examples printed at the end; 0 = no summary"})

    def __post_init__(self) -> None:
        for key in ("model", "problems", "out"):
            if not getattr(self, key):
                raise UserError(f"key '{key}' is empty")
        check_numbers(
            self,
            positive=("samples", "batch_size", "resamples"),
            not_negative=(
                "max_new_tokens",
                "limit",
                "report_traces",
                "details",
                "show_examples",
                "temperature",
                "seed",
            ),
        )
        if self.shard != MERGE:
            parse_shard(self.shard)
        if self.endpoint and not self.endpoint.get("model"):
            raise UserError("key 'endpoint' must name a model, as in --endpoint model=NAME,base_url=URL")
        for key in ENDPOINT_OURS:
            if key in self.endpoint:
                ours = {"max_tokens": "max_new_tokens"}.get(key, key)
                other = f"set --{ours}" if hasattr(self, ours) else "it does not apply here"
                raise UserError(f"key 'endpoint' must not hold '{key}': {other}, so that all arms decode alike")
