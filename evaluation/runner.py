"""One arm, one batch: generate, judge, and turn traces into outcomes. Parts are files, so a kill costs one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.data_builders.families import score
from neureasoner.data_builders.families.countdown import evaluate as value_of
from neureasoner.data_builders.judges import ExactJudge
from neureasoner.evaluation.arms import Arm
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.metrics import Outcome, majority
from neureasoner.evaluation.oracle import ExactOracles
from neureasoner.steps import Separators
from neureasoner.traces import Problem, Trace, read_traces, write_rows


def batch_seed(seed: int, sample: int, batch: int) -> int:
    """The seed of a batch: the same in every arm, so arms are paired."""
    return int(np.random.SeedSequence([seed, sample, batch]).generate_state(1)[0])


def same_answer(a: str, b: str) -> bool:
    """Whether two final answers are one: equal text, or equal value from the same numbers."""
    if a.strip() == b.strip():
        return True
    x, y = value_of(a), value_of(b)
    return x is not None and y is not None and abs(x[0] - y[0]) < 1e-9 and sorted(x[1]) == sorted(y[1])


def _spans(forced: Sequence[int], offsets: Sequence[int]) -> list[list[int]]:
    """Character spans of forced tokens, neighbours joined."""
    spans: list[list[int]] = []
    for t in forced:
        if spans and spans[-1][1] == offsets[t]:
            spans[-1][1] = offsets[t + 1]
        else:
            spans.append([offsets[t], offsets[t + 1]])
    return spans


class ArmRun:
    """All batches of one arm. ``model`` is a SteeredModel; ``k`` is the number of votes (1: no vote).

    A part holds one sample of one batch of problems; a vote's ``k`` answers to a problem are in the same part.
    """

    def __init__(self, arm: Arm, model: Callable[[], Any], config: EvaluateConfig, problems: list[Problem], k: int = 1):
        self.arm, self._load, self.config, self.k = arm, model, config, k
        self._model: Any = None
        size = config.batch_size
        # Neighbours of like length waste the least: a batch runs until its longest response ends.
        problems = sorted(problems, key=lambda p: (p.family, p.difficulty))
        self.batches = [problems[i : i + size] for i in range(0, len(problems), size)]
        self.jobs = [(s, b) for s in range(config.samples) for b in range(len(self.batches))]
        self.parts = Path(config.out) / "parts" / arm.name
        self.file = Path(config.out) / "traces" / f"{arm.name}.jsonl"
        self.judge = ExactJudge()

    @property
    def model(self) -> Any:
        """Loaded at the first batch that has to be generated."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def part(self, sample: int, batch: int) -> list[Trace]:
        """Traces of one part, from its file or generated now."""
        file = self.parts / f"{sample:03d}-{batch:05d}.jsonl"
        if file.is_file():
            return read_traces(file)
        traces: list[Trace] = []
        for vote in range(self.k):
            traces += self._generate(sample, batch, vote)
        write_rows(file, traces)
        return traces

    def _generate(self, sample: int, batch: int, vote: int) -> list[Trace]:
        config, problems = self.config, self.batches[batch]
        oracles = ExactOracles().functions() if self.arm.trigger == "oracle" else None
        seed = batch_seed(config.seed, sample * self.k + vote, batch)
        generations = self.model.generate(
            problems,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=seed,
            batch_size=len(problems),
            nothinking=self.arm.nothinking,
            oracles=oracles,
        )
        separators = Separators.of(self.model.tokenizer)
        traces = []
        for problem, g in zip(problems, generations, strict=True):
            name = f"{problem.id}#{sample}" + (f".{vote}" if self.k > 1 else "")
            trace = g.to_trace(name, problem, arm=self.arm.name, sample=sample, vote=vote, seed=seed, scores=g.scores)
            offsets = separators.offsets(trace.response_ids)[1]
            trace.meta["forced_chars"] = _spans(trace.meta.get("forced", []), offsets)
            for event in trace.events:
                event["char"] = offsets[event["token"]]
            trace.labels = self.judge.judge(trace)
            traces.append(trace)
        return traces

    def merge(self) -> None:
        """Put the parts into one file, then drop them."""
        if self.file.is_file():
            return
        write_rows(self.file, (t for sample, batch in self.jobs for t in self.part(sample, batch)))
        self._model = None
        for sample, batch in self.jobs:
            (self.parts / f"{sample:03d}-{batch:05d}.jsonl").unlink(missing_ok=True)
        self.parts.rmdir()


def outcomes(traces: Sequence[Trace], max_new_tokens: int) -> list[Outcome]:
    """One outcome per problem and sample; several votes of one sample become one."""
    groups: dict[tuple[str, int], list[Trace]] = {}
    for t in traces:
        groups.setdefault((t.problem.id, int(t.meta.get("sample", 0))), []).append(t)
    return [_outcome(group, sample, max_new_tokens) for (_, sample), group in groups.items()]


def _outcome(group: list[Trace], sample: int, cap: int) -> Outcome:
    problem, labels = group[0].problem, [t.labels for t in group]
    assert all(label is not None for label in labels)
    if len(group) == 1:
        correct = bool(labels[0] and labels[0].correct)
    else:
        correct = score(problem, majority([label.answer if label else None for label in labels], same_answer))
    return Outcome(
        problem=problem.id,
        family=problem.family,
        difficulty=problem.difficulty,
        sample=sample,
        correct=correct and any(t.finished for t in group),
        tokens=float(sum(len(t.response_ids) if t.finished else cap for t in group)),
        truncated=sum(not t.finished for t in group) / len(group),
        triggers=sum(not e["suppressed"] for t in group for e in t.events),
        seconds=sum(float(t.meta.get("seconds", 0.0)) for t in group),
        responses=len(group),
    )
