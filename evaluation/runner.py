"""One arm, one batch: generate, judge, and turn traces into outcomes. Parts are files, so a kill costs one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neureasoner.data_builders.families import FAMILIES, score
from neureasoner.data_builders.families.countdown import evaluate as value_of
from neureasoner.data_builders.grading import grade as grading
from neureasoner.data_builders.judges import ExactJudge
from neureasoner.errors import UserError
from neureasoner.evaluation.arms import Arm
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.metrics import Outcome, majority
from neureasoner.evaluation.problems import is_program
from neureasoner.evaluation.store import Key, SampleStore, check_once, key_of
from neureasoner.prompts import encode_prompt, encode_text
from neureasoner.steps import Separators
from neureasoner.thinking import closed_thinking
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace

if TYPE_CHECKING:
    from neureasoner.inference.controller import Oracle

ANSWER = "answer"  # the judge of a final answer alone: of the steps it says nothing, not that they are right


def batch_seed(seed: int, sample: int, batch: int) -> int:
    """The seed of a batch: the same in every arm, so arms are paired."""
    return int(np.random.SeedSequence([seed, sample, batch]).generate_state(1)[0])


def same_answer(a: str, b: str) -> bool:
    """Whether two final answers are one: equal text, or equal value from the same numbers."""
    if a.strip() == b.strip():
        return True
    x, y = value_of(a), value_of(b)
    return x is not None and y is not None and abs(x[0] - y[0]) < 1e-9 and sorted(x[1]) == sorted(y[1])


def equivalence(problem: Problem) -> Callable[[str, str], bool]:
    """When two answers to a problem are one: by the family's own numbers, else mathematically.

    Raises UserError for programs: no two of them are one answer, so there is no majority (core.md §5.3).
    """
    if problem.family in FAMILIES:
        return same_answer
    if is_program(problem):
        raise UserError(f"problem '{problem.id}': programs have no majority, so no vote can be held over them")
    # math-verify's comparison is not symmetric
    return lambda a, b: grading.same_answer(a, b) or grading.same_answer(b, a)


def judged(trace: Trace) -> Labels:
    """Labels of a trace: by the family's exact judge, or of its final answer alone. An unfinished one is wrong."""
    problem = trace.problem
    if problem.family in FAMILIES:
        return ExactJudge().judge(trace)
    answer = grading.answer_of(problem, trace.response, final_number=True) if trace.finished else None
    return Labels(grading.grade(problem, answer), answer, IntraLabel(), InterLabel(), judge=ANSWER)


def _spans(forced: Sequence[int], offsets: Sequence[int]) -> list[list[int]]:
    """Character spans of forced tokens, neighbours joined."""
    spans: list[list[int]] = []
    for t in forced:
        if spans and spans[-1][1] == offsets[t]:
            spans[-1][1] = offsets[t + 1]
        else:
            spans.append([offsets[t], offsets[t + 1]])
    return spans


def _prefill(tokenizer: Any, problem: Problem) -> int:
    """Tokens of the closed thinking that is added to a prompt: they count as generated (core.md §5.10), wherever they
    stand."""
    return len(encode_text(tokenizer, closed_thinking(encode_prompt(tokenizer, problem), tokenizer)))


class ArmRun:
    """All batches of one arm. ``model`` is a SteeredModel; ``k`` is the number of votes (1: no vote); ``oracles`` makes
    those of a batch, which the plan's rules name.

    A part holds one sample of one batch of problems; a vote's ``k`` answers to a problem are in the same part.
    """

    def __init__(
        self,
        arm: Arm,
        model: Callable[[], Any],
        config: EvaluateConfig,
        problems: list[Problem],
        k: int = 1,
        oracles: Callable[[], Mapping[str, Oracle]] | None = None,
    ):
        self.arm, self._load, self.config, self.k, self._oracles = arm, model, config, k, oracles
        self._model: Any = None
        size = config.batch_size
        # Neighbours of like length waste the least: a batch runs until its longest response ends.
        problems = sorted(problems, key=lambda p: (p.family, p.difficulty))
        self.batches = [problems[i : i + size] for i in range(0, len(problems), size)]
        self.jobs = [(s, b) for s in range(config.samples) for b in range(len(self.batches))]
        self.store = SampleStore(config.out, arm.name, {job: self._keys(*job) for job in self.jobs})
        self.file = self.store.file

    def _keys(self, sample: int, batch: int) -> list[Key]:
        return [
            Key(self.arm.name, p.id, sample, vote, self._seed(sample, batch, vote))
            for vote in range(self.k)
            for p in self.batches[batch]
        ]

    def _seed(self, sample: int, batch: int, vote: int) -> int:
        return batch_seed(self.config.seed, sample * self.k + vote, batch)

    @property
    def model(self) -> Any:
        """Loaded at the first batch that has to be generated."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def part(self, sample: int, batch: int) -> list[Trace]:
        """Traces of one part, from its file or generated now."""
        kept = self.store.read((sample, batch))
        if kept is not None:
            return kept
        traces = [t for vote in range(self.k) for t in self._generate(sample, batch, vote)]
        self.store.write((sample, batch), traces)
        return traces

    def _generate(self, sample: int, batch: int, vote: int) -> list[Trace]:
        config, problems = self.config, self.batches[batch]
        seed = self._seed(sample, batch, vote)
        tokenizer = self.model.tokenizer
        prefills = [_prefill(tokenizer, p) if self.arm.nothinking else 0 for p in problems]
        generations = self.model.generate(
            problems,
            max_new_tokens=max(1, config.max_new_tokens - max(prefills)),
            temperature=config.temperature,
            top_p=config.top_p,
            seed=seed,
            batch_size=len(problems),
            nothinking=self.arm.nothinking,
            oracles=self._oracles() if self._oracles else None,
        )
        given = zip(problems, generations, prefills, strict=True)
        return [self.trace(problem, g, prefill, sample, vote, seed) for problem, g, prefill in given]

    def trace(self, problem: Problem, g: Any, prefill: int, sample: int, vote: int, seed: int) -> Trace:
        """A response as the trace that is kept, judged."""
        name = f"{problem.id}#{sample}" + (f".{vote}" if self.k > 1 else "")
        trace: Trace = g.to_trace(
            name, problem, arm=self.arm.name, sample=sample, vote=vote, seed=seed, scores=g.scores
        )
        offsets = Separators.of(self.model.tokenizer).offsets(trace.response_ids)[1]
        if prefill:
            trace.meta["prefill"] = prefill
        trace.meta["forced_chars"] = _spans(trace.meta.get("forced", []), offsets)
        for event in trace.events:
            event["char"] = offsets[event["token"]]
        trace.labels = judged(trace)
        return trace

    def merge(self) -> None:
        """Put the parts into one file, then drop them."""
        self.store.merge()
        self._model = None


def outcomes(traces: Sequence[Trace], max_new_tokens: int) -> list[Outcome]:
    """One outcome per problem and sample; several votes of one sample become one. Raises UserError for a repeat."""
    check_once(map(key_of, traces), "traces")
    groups: dict[tuple[str, int], list[Trace]] = {}
    for t in traces:
        groups.setdefault((t.problem.id, int(t.meta.get("sample", 0))), []).append(t)
    return [_outcome(group, sample, max_new_tokens) for (_, sample), group in groups.items()]


def _tokens(trace: Trace, cap: int) -> float:
    """Every generated or forced token (as a server counted them, where one did), also those of a prefilled thinking; a
    truncated response costs the cap."""
    if not trace.finished:
        return float(cap)
    return float(trace.meta.get("tokens") or len(trace.response_ids)) + trace.meta.get("prefill", 0)


def _outcome(group: list[Trace], sample: int, cap: int) -> Outcome:
    problem, labels = group[0].problem, [t.labels for t in group]
    assert all(label is not None for label in labels)
    answers = [label.answer if label and t.finished else None for label, t in zip(labels, group, strict=True)]
    if len(group) == 1:
        answer = answers[0]
        correct = bool(labels[0] and labels[0].correct)
    else:
        answer = majority(answers, equivalence(problem))
        right = score if problem.family in FAMILIES else grading.grade
        correct = right(problem, answer)
    return Outcome(
        problem=problem.id,
        family=problem.family,
        difficulty=problem.difficulty,
        sample=sample,
        correct=correct and any(t.finished for t in group),
        tokens=sum(_tokens(t, cap) for t in group),
        truncated=sum(not t.finished for t in group) / len(group),
        triggers=sum(not e["suppressed"] for t in group for e in t.events),
        seconds=sum(float(t.meta.get("seconds", 0.0)) for t in group),
        responses=len(group),
        forced=float(sum(len(t.meta.get("forced", [])) + t.meta.get("prefill", 0) for t in group)),
        probe_tokens=float(sum(t.meta.get("probe_tokens", 0) for t in group)),
        answer=answer,
    )
