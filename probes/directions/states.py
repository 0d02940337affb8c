"""Which states of a trace are compared, which side they are on, and reading them off the model.

Legend: ``B`` rows of a batch, ``T`` tokens, ``C`` values of a site, ``P`` states of a trace (1, or one a boundary).
Positions count in prompt + response; position 0 (an attention sink) and a final end token are never read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch

from neureasoner.errors import UserError
from neureasoner.forward import read
from neureasoner.models import input_device
from neureasoner.probes.attribution.contrast import encode
from neureasoner.probes.attribution.rcn_config import RcnConfig
from neureasoner.probes.directions.config import CONTRASTS, DirectionsConfig
from neureasoner.probes.directions.estimators import Example
from neureasoner.probes.labels import labels_of
from neureasoner.sites import LAYERED, Layout, Site, edit_site, read_sites
from neureasoner.steps import Separators, segment
from neureasoner.thinking import opens_thinking
from neureasoner.traces import Trace

CHUNK = 1 << 23  # values in float64 at once
PROBLEMS = 4  # problems whose traces are read together and held until all of them are read


@dataclass(frozen=True)
class States:
    """The states of one trace: at ``positions``, or their mean if ``pooled``; ``sides`` has one entry a state."""

    problem: str
    ids: list[int]
    positions: tuple[int, ...]
    pooled: bool
    sides: tuple[bool, ...]


def sites_of(layout: Layout, texts: Iterable[str], ranked: bool = False) -> list[str]:
    """The sites meant, held against the model: ``kind:*`` is every block, heads without indices all of a block.

    ``ranked``: whole blocks of neurons are wanted, and nothing else. Raises UserError for a site that is not in the
    model, that holds no vector, or is of the other sort.
    """
    found = []
    for text in texts:
        kind, _, layer = text.replace(" ", "").partition(":")
        every = kind in LAYERED and layer == "*"
        for site in [Site(kind, i) for i in range(layout.n_layers)] if every else [layout.check(text)]:
            whole = site.kind == "neuron" and site.indices is None
            if ranked != whole:
                raise UserError(
                    f"site '{site}': the estimator 'relative' takes whole blocks of neurons (neuron:*), the others "
                    "take residual, attn_out, mlp_out, heads, or neurons by their indices"
                )
            if site.kind not in LAYERED:
                raise UserError(f"site '{site}' holds no vector, so no direction can be made there")
            if site.kind == "head" and site.indices is None:
                site = Site("head", site.layer, tuple(range(layout.n_heads)))
            found.append(str(site))
    return list(dict.fromkeys(found))


def states_of(traces: Iterable[Trace], tokenizer: Any, config: DirectionsConfig) -> list[States]:
    """The states the contrast compares, problem by problem. Traces without a response, or on no side, are left out."""
    rows = RcnConfig("", "", "", retokenise=config.retokenise, template=config.template)
    encoded = [(t, *encode(t, tokenizer, rows)) for t in sorted(traces, key=lambda t: t.problem.id)]
    encoded = [e for e in encoded if e[3] > e[2]]
    if config.contrast == "thoughts":
        return [s for t, ids, begin, _ in encoded if (s := _boundaries(t, ids, begin, tokenizer, config)).sides]
    if config.contrast == "correct":
        chosen = [(e, labels_of(e[0]).correct) for e in encoded]
    else:
        chosen = [pair for _, group in groupby(encoded, key=lambda e: e[0].problem.id) for pair in _extremes(group)]
    mean = (config.pool or CONTRASTS[config.contrast]) == "mean"
    return [
        States(t.problem.id, ids, tuple(range(begin, end)) if mean else (end - 1,), mean, (side,))
        for (t, ids, begin, end), side in chosen
    ]


def _extremes(group: Iterable[Any]) -> list[tuple[Any, bool]]:
    """The shortest (positive) and the longest right and finished answer to a problem, if they differ in length."""
    right = sorted((e for e in group if labels_of(e[0]).correct and e[0].finished), key=lambda e: len(e[1]))
    if len(right) < 2 or len(right[0][1]) == len(right[-1][1]):
        return []
    return [(right[0], True), (right[-1], False)]


def _boundaries(trace: Trace, ids: list[int], begin: int, tokenizer: Any, config: DirectionsConfig) -> States:
    """The last token of each step that another follows; positive where that one is execution."""
    response = ids[begin:]
    text, _ = Separators.of(tokenizer).offsets(response)
    # a finished trace ends with whatever token it is that its model ends with; read as text again, with none
    ends = response[-1:] if trace.finished and not config.retokenise else ()
    steps, _ = segment(response, tokenizer, ends, opens_thinking(ids[:begin], tokenizer))
    at, sides = [], []
    for one, following in pairwise(steps):
        at.append(begin + one.token_end - 1)
        sides.append(thought(text[following.char_start : following.char_end], config) == "execution")
    return States(trace.problem.id, ids, tuple(at), False, tuple(sides))


def thought(text: str, config: DirectionsConfig) -> str:
    """``reflection``, ``transition`` or ``execution`` by the keywords, in this order; ``^`` marks how it begins."""
    text = text.strip().lower()
    for name, words in (("reflection", config.reflection), ("transition", config.transition)):
        for word in words:
            word = word.lower()
            if text.startswith(word[1:]) if word.startswith("^") else word in text:
                return name
    return "execution"


def read_states(
    model: Any,
    states: Sequence[States],
    sites: Sequence[str],
    batch_size: int,
    advance: Callable[[int], None] = lambda n: None,
) -> Iterator[Example]:
    """One example a state, problem by problem; values ``[C]`` float64. Teacher forcing, padded on the right.

    Raises UserError if a site does not fire.
    """
    by_problem = [list(group) for _, group in groupby(states, key=lambda s: s.problem)]
    for start in range(0, len(by_problem), PROBLEMS):
        part = [s for group in by_problem[start : start + PROBLEMS] for s in group]
        values: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
        order = sorted(range(len(part)), key=lambda i: len(part[i].ids))
        for first in range(0, len(order), batch_size):
            members = order[first : first + batch_size]
            for site, found in _read_batch(model, [part[i] for i in members], sites).items():
                ends = np.cumsum([len(part[i].sides) for i in members])
                for i, rows in zip(members, np.split(found, ends[:-1]), strict=True):
                    values[i][site] = rows
            advance(len(members))
        for i, state in enumerate(part):
            for n, side in enumerate(state.sides):
                yield Example({site: rows[n] for site, rows in values[i].items()}, side, state.problem)


def _read_batch(model: Any, batch: Sequence[States], sites: Sequence[str]) -> dict[str, np.ndarray]:
    """Site -> the states of all rows of one batch, one after the other ``[sum of P, C]`` float64."""
    layout, device = Layout.of(model), input_device(model)
    width = max(len(s.ids) for s in batch)
    ids = torch.tensor([s.ids + [0] * (width - len(s.ids)) for s in batch], device=device)
    pooled = batch[0].pooled
    row = torch.tensor([j for j, s in enumerate(batch) for _ in s.positions], device=device)
    at = torch.tensor([p for s in batch for p in s.positions], device=device)
    weight = torch.zeros(len(batch), width, dtype=torch.float64, device=device)
    if pooled:
        counts = torch.tensor([len(s.positions) for s in batch], device=device)
        weight[row, at] = 1 / counts.double()[row]
    got: dict[str, torch.Tensor] = {}

    def take(site: str, value: torch.Tensor) -> None:
        got[site] = _mean(value, weight) if pooled else value[row, at].double()

    def head(site: Site) -> Callable[[torch.Tensor], torch.Tensor]:
        index = torch.tensor(site.indices, device=device)

        def look(value: torch.Tensor) -> torch.Tensor:  # read_sites has norms of heads, a direction needs the slices
            take(str(site), value.unflatten(-1, (layout.n_heads, layout.head_dim)).index_select(-2, index).flatten(-2))
            return value

        return look

    parsed = [Site.parse(s) for s in sites]
    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(read_sites(model, [s for s in parsed if s.kind != "head"], take))
        for site in (s for s in parsed if s.kind == "head"):
            stack.enter_context(edit_site(model, site, head(site)))
        read(model, ids)  # causal: what is right of a row cannot reach it
    missing = [s for s in sites if s not in got]
    if missing:
        raise UserError(f"site '{missing[0]}' did not fire; the model skips it, so it cannot be read")
    return {site: got[site].cpu().numpy() for site in sites}


def _mean(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted sums over tokens: ``value [B, T, C]``, ``weight [B, T]`` -> ``[B, C]`` float64."""
    total = torch.zeros(value.shape[0], value.shape[2], dtype=torch.float64, device=value.device)
    step = max(1, CHUNK // (value.shape[0] * value.shape[2]))
    for i in range(0, value.shape[1], step):
        total += (weight[:, None, i : i + step] @ value[:, i : i + step].double())[:, 0]
    return total


def projections(
    examples: Iterable[Example], directions: Mapping[str, np.ndarray], paired: bool
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sides ``[E]`` and, by site, how far the ``E`` states lie along ``directions``.

    ``paired``: less the mean of their problem, which is what a direction of paired differences speaks of.
    """
    sides: list[bool] = []
    problems: list[str] = []
    along: dict[str, list[float]] = {site: [] for site in directions}
    for e in examples:
        sides.append(e.positive)
        problems.append(e.problem)
        for site, d in directions.items():
            along[site].append(float(e.values[site] @ d))
    scores = {site: np.array(values) for site, values in along.items()}
    if paired and problems:
        _, of = np.unique(problems, return_inverse=True)
        n = np.bincount(of)
        scores = {site: s - (np.bincount(of, s) / n)[of] for site, s in scores.items()}
    return np.array(sides), scores
