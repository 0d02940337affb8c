"""How a stage asks a language model: its endpoint's settings, a forecast, a batch, a live line, a bill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neureasoner.config import from_dict
from neureasoner.data_builders.endpoint.config import EndpointConfig
from neureasoner.data_builders.endpoint.requests import Outcome, Question
from neureasoner.data_builders.endpoint.tally import Tally

if TYPE_CHECKING:
    from neureasoner.data_builders.llm_judges import CallSettings

# What may change between two runs into one folder: none of it changes an answer.
FREE = ("concurrency", "timeout", "requests_per_minute", "tokens_per_minute", "tries", "backoff", "max_cost", "ledger")


def endpoint_of(values: Mapping[str, Any], out: str) -> EndpointConfig:
    """Settings of the endpoint. Without ``ledger`` the answers are kept beside the stage's folder. Raises UserError."""
    kept = {"ledger": str(Path(out).with_name(Path(out).name + ".answers.sqlite")), **values}
    return from_dict(EndpointConfig, kept, "key 'endpoint'")


def stage_settings(config: Any) -> Any:
    """The settings as a stage folder compares them: with the prompts' hash, without what changes no answer.

    Settings without an endpoint ask nobody and are compared as they are.
    """
    if not config.endpoint:
        return config
    from neureasoner.data_builders.llm_judges import prompts_hash

    kept = {k: v for k, v in config.endpoint.items() if k not in FREE}
    free = {"endpoint": kept, "batch": False, "probe": 0}
    fields = [(f.name, f.type) for f in dataclasses.fields(config)]
    cls = dataclasses.make_dataclass("Settings", [*fields, ("prompts", str)])
    return cls(**{**vars(config), **free}, prompts=prompts_hash())


class Endpoint:
    """Questions in, outcomes out, with a live line; ``tally`` sums up what this run asked and paid."""

    def __init__(self, values: Mapping[str, Any], out: str, label: str):
        self.config, self.label, self.tally = endpoint_of(values, out), label, Tally()

    @property
    def settings(self) -> CallSettings:
        """What all questions of the stage share."""
        from neureasoner.data_builders.llm_judges import CallSettings

        return CallSettings(self.config.model, self.config.params())

    def ask(self, questions: Iterable[Question[Any]], total: int | None = None) -> Iterator[Outcome[Any]]:
        """Outcomes in the order of the questions. Raises UserError when the endpoint will answer nothing more."""
        from neureasoner.data_builders.endpoint.asker import ask_all
        from neureasoner.data_builders.endpoint.progress import live

        with live(self.label) as watch:
            yield from ask_all(questions, self.config, progress=watch, total=total, tally=self.tally)

    def forecast(self, questions: Iterable[Question[Any]], probe: int) -> dict[str, Any]:
        """Print and return what asking them would cost."""
        from neureasoner.data_builders.endpoint.forecast import forecast

        expected = forecast(questions, self.config, probe=probe)
        print(expected)
        return dataclasses.asdict(expected)

    def batch(self, questions: Callable[[], Iterable[Question[Any]]]) -> None:
        """Answer as many as possible through the Batch API; ``ask`` then finds them in the ledger."""
        from neureasoner.data_builders.endpoint.batches import run_batches
        from neureasoner.data_builders.endpoint.progress import live

        with live(f"{self.label} (batch)") as watch:
            run_batches(questions, self.config, progress=watch)
