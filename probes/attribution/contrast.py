"""Mean activations over right and over wrong traces, and the neurons in which they differ (core.md §3.2, §3.3).

Legend: ``B`` rows of a batch, ``T`` tokens, ``M`` traces, ``Q`` questions (each with right and wrong traces), ``F``
neurons of a block, ``L`` blocks, ``N = L * F`` (neuron ``n`` of block ``l`` is column ``l * F + n``), ``K`` neurons
kept, ``R`` bootstrap draws, ``P`` permutations. ``S = g - b``, the means over right and over wrong traces.

Every trace counts by its mean over tokens. Memory: one block of one batch at a time, plus ``8 Q N`` bytes (means per
question, float32) and ``16 P N`` bytes (shuffled means): 0.4 and 0.3 GB for 300 questions and 100 shuffles of
Qwen3-1.7B (N = 172,032).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from neureasoner.errors import UserError
from neureasoner.forward import read
from neureasoner.models import input_device
from neureasoner.probes.attribution.rcn_config import RcnConfig
from neureasoner.probes.detectors.metrics import bootstrap_draws
from neureasoner.prompts import encode_prompt
from neureasoner.sites import Layout, read_sites
from neureasoner.traces import Trace

CHUNK = 1 << 23  # activations in float64 at once
COLUMNS = 1 << 13  # neurons ranked at once
QUESTIONS = 16  # questions whose traces are sorted by length together
MARKER = re.compile(r"(?:<[|｜][^<>]*[|｜]>|</s>)\s*$")  # how tokenizers write the end of a turn
Row = tuple[list[int], int, int]  # token ids, first and one past the last position of the span
Block = tuple[int, np.ndarray, np.ndarray]  # first column, g and b of so many neurons [R, c]


def encode(trace: Trace, tokenizer: Any, config: RcnConfig) -> Row:
    """Token ids of a trace and the positions its mean runs over, which may be none.

    Position 0 is left out (attention sinks live there), and so is a final end token: decoding never reads it, and
    traces that were cut off, mostly wrong ones, lack it. Raises UserError if the ids are not this tokenizer's.
    """
    if config.retokenise:
        text = MARKER.sub("", trace.response) if trace.finished else trace.response
        prompt = _prompt_ids(tokenizer, trace.problem.question, config.template)
        response = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        prompt, response = trace.prompt_ids, trace.response_ids
        decoded = tokenizer.decode(response, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded != trace.response or max(prompt, default=0) >= len(tokenizer):
            raise UserError(
                f"trace '{trace.id}': its token ids are not of this model's tokenizer, so another model wrote it; set "
                "retokenise to read problem and response as text"
            )
        if not prompt:
            raise UserError(f"trace '{trace.id}' has no prompt tokens; sample it again, or set retokenise")
    ids = [*prompt, *response]
    ended = trace.finished and not config.retokenise and bool(response)  # its last id is the one that ended it
    return ids, max(1, len(prompt) if config.span == "response" else 1), len(ids) - ended


def _prompt_ids(tokenizer: Any, question: str, template: bool) -> list[int]:
    if not template:  # the headings of the released code
        return list(tokenizer(f"Question: {question}\nThinking process:\n")["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("this model's tokenizer has no chat template; set template to false for plain text")
    return encode_prompt(tokenizer, question)


def span_means(model: Any, rows: Sequence[Row], batch_size: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Mean and mean square of all neurons over each row's span: ``(row numbers [B], [B, N], [B, N])``, float64.

    Teacher forcing, padded on the right, rows of like length together. Raises UserError if a block does not fire.
    """
    layout, device = Layout.of(model), input_device(model)
    sites = {f"neuron:{layer}": layer for layer in range(layout.n_layers)}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        width = max(len(rows[i][0]) for i in members)
        ids = torch.zeros(len(members), width, dtype=torch.long)
        weight = torch.zeros(len(members), width, dtype=torch.float64)
        for j, i in enumerate(members):
            row, begin, end = rows[i]
            ids[j, : len(row)] = torch.tensor(row)
            weight[j, begin:end] = 1 / (end - begin)
        got: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        weight = weight.to(device)

        def reduce(name: str, value: torch.Tensor, weight: torch.Tensor = weight, got: dict = got) -> None:  # type: ignore[type-arg]
            got[sites[name]] = _moments(value, weight)

        with torch.inference_mode(), read_sites(model, sites, reduce):
            read(model, ids.to(device))  # causal: what is right of a row cannot reach it
        if len(got) != layout.n_layers:
            missing = sorted(set(sites.values()) - set(got))
            raise UserError(f"site 'neuron:{missing[0]}' did not fire; the model skips it, so it cannot be read")
        pair = (torch.cat([got[k][j] for k in range(layout.n_layers)], dim=1).cpu().numpy() for j in (0, 1))
        yield members, next(pair), next(pair)


def _moments(value: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums of ``value [B, T, F]`` and of its square with ``weight [B, T]``: two ``[B, F]``, float64."""
    if value.shape[:2] != weight.shape:
        raise UserError(f"a block gave {tuple(value.shape[:2])} rows for {tuple(weight.shape)} tokens; cannot be read")
    n_rows, n_tokens, width = value.shape
    total = torch.zeros(n_rows, width, dtype=torch.float64, device=value.device)
    square = torch.zeros_like(total)
    step = max(1, CHUNK // (n_rows * width))
    for i in range(0, n_tokens, step):
        x, w = value[:, i : i + step].double(), weight[:, None, i : i + step]
        total += (w @ x)[:, 0]
        square += (w @ x.square_())[:, 0]
    return total, square


@dataclass
class Contrast:
    """Means of right and wrong traces per question ``[Q, N]`` float32, with the counts behind them ``[Q]``.

    ``sigma [N]``: standard deviation over all tokens of the spans. ``null_right``, ``null_wrong`` ``[P, N]``: ``g`` and
    ``b`` under labels shuffled within each question.
    """

    right: np.ndarray
    wrong: np.ndarray
    n_right: np.ndarray
    n_wrong: np.ndarray
    sigma: np.ndarray
    null_right: np.ndarray
    null_wrong: np.ndarray


def shuffled_labels(right: np.ndarray, question: np.ndarray, n: int, seed: int) -> np.ndarray:
    """``[n, M]`` labels permuted within each question. ``right [M]`` bool, ``question [M]`` ascending from 0."""
    rng = np.random.default_rng([seed, 1])
    n_right, first = np.bincount(question, right), np.searchsorted(question, np.arange(question[-1] + 1))
    order = np.lexsort((rng.random((n, len(right))), np.broadcast_to(question, (n, len(right)))), axis=1)
    rank = np.arange(len(right)) - first[question]  # of the trace that stands there, within its question
    out = np.empty((n, len(right)), dtype=bool)
    np.put_along_axis(out, order, np.broadcast_to(rank < n_right[question], out.shape), axis=1)
    return out


def question_weights(counts: np.ndarray, draws: np.ndarray, pooling: str) -> np.ndarray:
    """Weight ``[R, Q]`` of each question's mean. ``counts [Q]`` traces behind it, ``draws [R, Q]`` multiplicities."""
    weights = draws * (counts if pooling == "pooled" else 1.0)
    return weights / weights.sum(axis=1, keepdims=True)


def contrast(
    model: Any,
    rows: Sequence[Row],
    right: np.ndarray,
    question: np.ndarray,
    config: RcnConfig,
    advance: Callable[[int], None] = lambda n: None,
) -> Contrast:
    """One pass over all traces. ``right [M]`` bool; ``question [M]`` ascending, each with both sides."""
    n_questions, n_neurons = int(question[-1]) + 1, Layout.of(model).n_layers * Layout.of(model).intermediate_size
    counts = [np.bincount(question, side, n_questions) for side in (~right, right)]
    shuffled = shuffled_labels(right, question, config.permutations, config.seed)
    ones = np.ones((1, n_questions))
    base = [question_weights(n, ones, config.pooling)[0] / n for n in counts]  # of one trace of the side
    means = np.zeros((2, n_questions, n_neurons), dtype=np.float32)
    null = np.zeros((2, config.permutations, n_neurons))
    total, square, tokens = np.zeros(n_neurons), np.zeros(n_neurons), 0
    for begin in range(0, n_questions, QUESTIONS):
        part = np.flatnonzero((question >= begin) & (question < begin + QUESTIONS))
        sums = np.zeros((2, min(QUESTIONS, n_questions - begin), n_neurons))
        for members, mean, mean_square in span_means(model, [rows[int(i)] for i in part], config.batch_size):
            at = part[members]
            np.add.at(sums, (right[at].astype(int), question[at] - begin), mean)
            for side in (0, 1):
                null[side] += ((shuffled[:, at] == side) * base[side][question[at]]) @ mean
            n = np.array([rows[int(i)][2] - rows[int(i)][1] for i in at], dtype=np.float64)
            total, square, tokens = total + n @ mean, square + n @ mean_square, tokens + n.sum()
            advance(len(members))
        for side in (0, 1):
            means[side, begin : begin + QUESTIONS] = sums[side] / counts[side][begin : begin + QUESTIONS, None]
    sigma = np.sqrt(np.maximum(square / tokens - (total / tokens) ** 2, 0))
    return Contrast(means[1], means[0], counts[1], counts[0], sigma, null[1], null[0])


def difference(g: np.ndarray, b: np.ndarray, sigma: np.ndarray, unit: str) -> np.ndarray:
    """``S`` in its unit; a neuron that never moves has none. Shapes ``[..., N]``."""
    s = g - b
    return s if unit == "raw" else np.divide(s, sigma, out=np.zeros_like(s), where=sigma > 0)


def top(blocks: Iterable[Block], sigma: np.ndarray, config: RcnConfig) -> tuple[np.ndarray, np.ndarray]:
    """First K neurons of every row: columns ``[R, K]`` (-1 where fewer qualify) and their ``|S|`` (0 there).

    Explicit ranking: opposite signs, then ``|S|``. Released ranking: ``|g - b| / (|g| + |b| + 1e-8)``, then ``|S|``,
    which is the same up to its 1e-8. Ties go to the lower column.
    """
    best: list[np.ndarray] = []  # key, |S|, column
    for start, g, b in blocks:
        size = np.abs(difference(g, b, sigma[start : start + g.shape[1]], config.unit))
        if config.ranking == "released":
            key = np.abs(g - b) / (np.abs(g) + np.abs(b) + 1e-8)
        else:
            key = ((g * b < 0) if config.filter_sign else np.ones(g.shape, bool)).astype(np.float64)
        pool = [key, size, np.broadcast_to(np.arange(start, start + g.shape[1]), g.shape)]
        if best:
            pool = [np.concatenate(pair, axis=1) for pair in zip(best, pool, strict=True)]
        order = np.lexsort((-pool[1], -pool[0]), axis=1)[:, : config.neurons]
        best = [np.take_along_axis(p, order, axis=1) for p in pool]
    return np.where(best[0] > 0, best[2], -1), np.where(best[0] > 0, best[1], 0.0)


def columns(g: np.ndarray, b: np.ndarray) -> Iterator[Block]:
    """``g`` and ``b`` ``[R, N]`` in blocks of neurons."""
    for start in range(0, g.shape[1], COLUMNS):
        yield start, g[:, start : start + COLUMNS], b[:, start : start + COLUMNS]


def resampled(c: Contrast, draws: np.ndarray, pooling: str) -> Iterator[Block]:
    """``g`` and ``b`` with questions counted as often as ``draws [R, Q]`` says, in blocks of neurons."""
    weights = [question_weights(n, draws, pooling) for n in (c.n_right, c.n_wrong)]
    for start, right, wrong in columns(c.right, c.wrong):
        yield start, weights[0] @ right.astype(np.float64), weights[1] @ wrong.astype(np.float64)


def random_neurons(layer: np.ndarray, index: np.ndarray, size: int, seed: int) -> np.ndarray:
    """As many other neurons of the same blocks ``[K]``, in the chosen ones' order; ``size`` is F."""
    rng = np.random.default_rng([seed, 7])
    out = np.empty_like(index)
    for block in np.unique(layer):
        at = np.flatnonzero(layer == block)
        others = np.setdiff1d(np.arange(size), index[at])
        out[at] = np.concatenate([rng.permutation(others), rng.permutation(index[at])])[: len(at)]
    return out


def statistics(c: Contrast, config: RcnConfig) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """Chosen columns ``[K]``, arrays about them ``[K]``, a summary, and the first K ``|S|`` by chance ``[P, K]``.

    ``t``: paired over questions. ``bootstrap``: share of draws of questions in which a neuron is among the first K
    again. ``chance``: the same search after right and wrong were shuffled within each question.
    """
    ones = np.ones((1, len(c.right)))
    g, b = (np.concatenate(x, axis=1)[0] for x in list(zip(*resampled(c, ones, config.pooling), strict=True))[1:])
    chosen = top(columns(g[None], b[None]), c.sigma, config)[0][0]
    chosen = chosen[chosen >= 0]
    if not len(chosen):
        raise UserError("no neuron's mean differs in sign between right and wrong traces; set filter_sign to false")
    s = difference(g, b, c.sigma, config.unit)[chosen]
    least = np.abs(s).min()
    draws = bootstrap_draws(len(c.right), config.bootstrap, config.seed)[1:]
    again = top(resampled(c, draws, config.pooling), c.sigma, config)[0]
    found = (again[:, None] == chosen[:, None]).any(axis=2)  # [R, K]
    shared = found.sum(axis=1)
    null = np.sort(top(columns(c.null_right, c.null_wrong), c.sigma, config)[1])[:, ::-1][:, : len(chosen)]
    kth = null[:, -1]
    flips, as_large = np.zeros(len(kth)), np.zeros(len(kth))
    for start, gs, bs in columns(c.null_right, c.null_wrong):
        flip = gs * bs < 0
        large = np.abs(difference(gs, bs, c.sigma[start : start + COLUMNS], config.unit)) >= least
        flips += flip.sum(axis=1)
        as_large += (large & (flip | (not config.filter_sign))).sum(axis=1)
    d = c.right[:, chosen].astype(np.float64) - c.wrong[:, chosen]
    error = d.std(axis=0, ddof=1) / np.sqrt(len(d))
    arrays = {
        "delta": s,
        "sigma": c.sigma[chosen],
        "right_mean": g[chosen],
        "wrong_mean": b[chosen],
        "t": np.divide(d.mean(axis=0), error, out=np.zeros(len(chosen)), where=error > 0),
        "bootstrap": found.mean(axis=0),
    }
    summary = {
        "flips": int((g * b < 0).sum()),
        "neurons_of_model": len(g),
        "size": {"least": _rounded(least), "largest": _rounded(np.abs(s).max())},
        "stability": {
            "draws": config.bootstrap,
            "mean_jaccard": _rounded((shared / (len(chosen) + (again >= 0).sum(axis=1) - shared)).mean()),
            "mean_share": _rounded(found.mean()),
        },
        "chance": {
            "permutations": config.permutations,
            "flips": _range(flips),
            "kth_size": _range(kth),
            "as_large_as_the_last": _range(as_large),
            "p_kth_size": _rounded((1 + (kth >= least).sum()) / (1 + len(kth))),
        },
    }
    return chosen, arrays, summary, null


def _rounded(value: Any) -> float:
    return float(f"{float(value):.6g}")


def _range(values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": _rounded(values.mean()), "low": _rounded(low), "high": _rounded(high)}
