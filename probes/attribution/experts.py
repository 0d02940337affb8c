"""Where the experts lie: in the MLP or in the heads, and at which depth (the paper's Observation 1; core.md §1.2.4).

Observation 1 says that intra and instance experts are neurons of the MLP and inter experts are heads. It rests on one
ranking of both types, whose outcome depends on how they are put on one scale, so four measures stand side by side:

- **raw**: selection frequency on failing spans, scores as they are. A head adds up what ``hd`` directions write, so its
  scores are large, of either sign: first at one token and last at another, which a worst rank does not forgive.
- **z**: each type to mean 0 and deviation 1 over the span first.
- **contrast**: z, selection frequency on failing spans minus the one on clean spans.
- **effect**: by how many of its own standard deviations failing spans rank a component further ahead than clean spans.
  Every component is its own scale, so this one gives the verdict, and says at which depth experts lie.

Legend: ``F`` neurons and ``H`` heads of a block, ``B`` blocks, ``C`` components of a pool, ``R`` spans, ``P`` problems,
``W`` draws of problems of which the first is the data itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from neureasoner.probes.attribution.selection import Pool, effects, hypergeometric, orders, usable
from neureasoner.probes.detectors.metrics import interval, weighted_auroc

EXPECTED = {"intra": "neurons", "inter": "heads", "instance": "neurons"}  # Observation 1
MEASURES = ("raw", "z", "contrast", "effect")
TAIL = 0.025  # on either side of a 95 % interval
FEWEST = 5  # failing problems below which a bootstrap over problems says nothing
FOLDS = 5
Interval = dict[str, Any]  # value, low, high; None where undefined


@dataclass
class Pools:
    """The pools of one level's failing and clean spans, by name.

    ``raw``, ``z``: both types of the chosen block. Where blocks are scanned, ``neuron:l`` and ``head:l`` of each, and
    ``depth``: all their components, ``[R, B * (F + H)]``, a block's neurons before its heads, z-scored by block and
    type so that no block leads by the size of its writes. ``clean`` is empty without a contrast.
    """

    failing: Mapping[str, Pool]
    clean: Mapping[str, Pool]

    def pair(self, name: str, contrast: bool = True) -> tuple[Pool, Pool | None]:
        """``(failing, clean)`` of one pool; without ``contrast`` or clean spans the second is None."""
        return self.failing[name], self.clean.get(name) if contrast else None

    def orders(self, measure: str, name: str, size: int, draws: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Components of a pool from first to last by one of ``MEASURES``: ``(rows of the draws, order [w, C])``.

        Draws without a span of each side are left out. ``contrast`` and ``effect`` need clean spans.
        """
        failing, clean = self.pair(name, measure in ("contrast", "effect"))
        rows = np.flatnonzero(usable(draws, failing, clean))
        if measure == "effect":
            assert clean is not None
            for part, effect in effects(failing, clean, draws[rows]):
                yield rows[part], np.argsort(-effect.round(9), axis=1, kind="stable")
        else:
            for part, order, _ in orders(failing, clean, size, draws[rows]):
                yield rows[part], order


def chance(n_neurons: int, n_heads: int, size: int) -> Interval:
    """Share of heads among ``size`` components at random: the mean, and the range that holds 95 % of such draws."""
    below = np.cumsum(hypergeometric(n_neurons + n_heads, n_heads, size))
    low, high = (int(np.searchsorted(below, q)) / size for q in (TAIL, 1 - TAIL))
    return {"value": n_heads / (n_neurons + n_heads), "low": low, "high": high}


def ahead_by_chance(n_neurons: int, n_heads: int) -> Interval:
    """How often a random head stands before a random neuron if types do not matter, and its 95 % range (normal)."""
    reach = 1.96 * np.sqrt((n_neurons + n_heads + 1) / (12 * n_neurons * n_heads))
    return {"value": 0.5, "low": max(0.0, 0.5 - reach), "high": min(1.0, 0.5 + reach)}


def heads_of(
    found: Iterator[tuple[np.ndarray, np.ndarray]], n_neurons: int, size: int, n_draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """``(share [W], ahead [W])`` of ``Pools.orders`` with the neurons first, nan for draws that are left out.

    ``share``: heads among the first ``size``; ``ahead``: how often a head stands before a neuron in the whole order.
    """
    share, ahead = np.full((2, n_draws), np.nan)
    for rows, order in found:
        is_head, n_heads = order >= n_neurons, order.shape[1] - n_neurons
        share[rows] = is_head[:, :size].mean(axis=1)
        behind = (is_head * np.arange(order.shape[1])).sum(axis=1) - n_heads * (n_heads - 1) / 2  # neurons before heads
        ahead[rows] = 1 - behind / (n_neurons * n_heads)
    return share, ahead


def verdict(share: Interval, ahead: Interval, by_chance: Interval, ahead_chance: Interval) -> str:
    """``heads``, ``neurons`` or ``undecided``: whose part is larger than problems and chance explain.

    ``heads`` if the interval of their share lies above the range of random selections, ``neurons`` if below. A few
    heads among many neurons are often missing by chance alone, so that no share could lie below the range; then
    ``neurons`` is decided by the whole order, if heads stand behind neurons in it by more than chance.
    """
    if share["low"] is None:
        return "undecided"
    if share["low"] > by_chance["high"]:
        return "heads"
    if by_chance["low"] > 0:
        return "neurons" if share["high"] < by_chance["low"] else "undecided"
    behind = ahead["high"] < ahead_chance["low"] and share["value"] <= by_chance["value"]
    return "neurons" if behind else "undecided"


def _scaled(values: Interval, by: float) -> Interval:
    return {k: None if v is None else round(v / by, 3) for k, v in values.items()}


def types_of(levels: Mapping[str, Pools], n_neurons: int, n_heads: int, size: int, draws: np.ndarray) -> dict[str, Any]:
    """Neurons or heads, by level and measure, in one block; and whether that is Observation 1.

    ``draws [W, P]`` are shared by the levels, so that ``differences`` between them are paired. ``size`` is the size of
    the joint selection. ``observation_1`` is reproduced if every level's verdict is the paper's,
    contradicted if one is the opposite, else undecided.
    """
    size = min(size, n_neurons + n_heads)
    by_chance, ahead_chance = chance(n_neurons, n_heads, size), ahead_by_chance(n_neurons, n_heads)
    out: dict[str, Any] = {"size": size, "chance": by_chance, "ahead_by_chance": ahead_chance, "levels": {}}
    shares: dict[str, np.ndarray] = {}
    for level, pools in levels.items():
        entry: dict[str, Any] = {"n_problems": len(np.unique(pools.failing["z"].problem)), "measures": {}}
        for measure in MEASURES if pools.clean else MEASURES[:2]:
            found = pools.orders(measure, "raw" if measure == "raw" else "z", size, draws)
            values = heads_of(found, n_neurons, size, len(draws))
            share, ahead = (interval(v) for v in values)
            shares[level] = values[0]
            entry["measures"][measure] = {
                "heads": share,
                "enrichment": _scaled(share, by_chance["value"]),
                "ahead": ahead,
                "verdict": verdict(share, ahead, by_chance, ahead_chance)
                if entry["n_problems"] >= FEWEST
                else "undecided",
            }
        entry["measure"], last = next(reversed(entry["measures"].items()))
        entry["verdict"], entry["expected"] = last["verdict"], EXPECTED[level]
        same, open_ = entry["verdict"] == entry["expected"], entry["verdict"] == "undecided"
        entry["status"] = "undecided" if open_ else "as in the paper" if same else "against the paper"
        out["levels"][level] = entry
    out["differences"] = {
        f"inter - {other}": interval(shares["inter"] - shares[other])
        for other in ("intra", "instance")
        if "inter" in shares and other in shares
    }
    statuses = {v["status"] for v in out["levels"].values()}
    complete = set(out["levels"]) == set(EXPECTED)
    out["observation_1"] = (
        "contradicted"
        if "against the paper" in statuses
        else "reproduced"
        if complete and statuses == {"as in the paper"}
        else "undecided"
    )
    return out


def _separation(pools: Pools, name: str, size: int, folds: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """AUROC ``[W]`` with which chosen components tell failing from clean spans of problems they were not chosen on.

    ``folds [P]`` puts problems into ``FOLDS`` parts; a part's spans are scored by how far ahead they rank the ``size``
    components of largest effect in the other parts (at most half of the pool: the mean rank of all is the same in every
    span). nan where a part leaves no spans to choose on.
    """
    failing, clean = pools.failing[name], pools.clean[name]
    width = failing.mean.shape[1]
    size = max(1, min(size, width // 2))
    others = (folds != np.arange(FOLDS)[:, None]).astype(np.float64)
    sets = np.zeros((FOLDS, width), dtype=bool)
    for rows, order in pools.orders("effect", name, size, others):
        sets[rows[:, None], order[:, :size]] = True
    if not sets.any(axis=1).all():
        return np.full(len(draws), np.nan)
    ahead = [
        np.where(sets[folds[s.problem]], -s.mean, 0).sum(axis=1, dtype=np.float64) / size for s in (failing, clean)
    ]
    scores = [a.round(4) for a in ahead]  # equal mean ranks stay equal
    y = np.repeat([1, 0], [len(s) for s in scores])
    return weighted_auroc(y, np.concatenate(scores), draws[:, np.concatenate([failing.problem, clean.problem])])


def separation(
    pools: Pools, block: int, wanted: Mapping[str, int], draws: np.ndarray, seed: int
) -> dict[str, Interval]:
    """How well chosen components of each type of a block tell failing from clean spans of other problems (AUROC).

    ``wanted``: components of each type. ``neuron - head`` is the difference, paired by draw. Empty without clean spans.
    """
    if not pools.clean:
        return {}
    folds = np.random.default_rng([seed, 11]).permutation(np.arange(draws.shape[1]) % FOLDS)
    found = {kind: _separation(pools, f"{kind}:{block}", n, folds, draws) for kind, n in wanted.items()}
    found["neuron - head"] = found["neuron"] - found["head"]
    return {k: interval(v) for k, v in found.items()}


def depth_of(
    pools: Pools,
    blocks: list[int],
    n_neurons: int,
    n_heads: int,
    wanted: Mapping[str, int],
    draws: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """Where along depth one level's experts lie, each list by block.

    ``share``: part of the first components of all scanned blocks by effect, as many as ``wanted`` (components of each
    type) in sum; ``separation`` by type, and ``best``, the block and type where it is largest. Without clean spans, the
    share is by selection frequency, and there is no separation.
    """
    width = n_neurons + n_heads
    size = min(sum(wanted.values()), width)
    share = {k: np.full((len(blocks), len(draws)), np.nan) for k in wanted}
    for rows, order in pools.orders("effect" if pools.clean else "z", "depth", size, draws):
        block, place = np.divmod(order[:, :size], width)
        for kind, is_kind in (("neuron", place < n_neurons), ("head", place >= n_neurons)):
            share[kind][:, rows] = ((block == np.arange(len(blocks))[:, None, None]) & is_kind).mean(axis=2)
    all_of = width * len(blocks)
    out: dict[str, Any] = {
        "size": size,
        "share": {k: [interval(b) for b in v] for k, v in share.items()},
        "chance": {"neuron": n_neurons / all_of, "head": n_heads / all_of},
    }
    if pools.clean:
        by_block = [separation(pools, b, wanted, draws, seed) for b in blocks]
        out["separation"] = {kind: [v[kind] for v in by_block] for kind in wanted}
        known = [(v[kind]["value"], b, kind) for b, v in zip(blocks, by_block, strict=True) for kind in wanted]
        best = max((v for v in known if v[0] is not None), default=None)
        out["best"] = best and {"block": best[1], "type": best[2]}
    return out


# What is printed and written


def percent(value: Interval, digits: int = 0) -> str:
    """``5 % [2, 8]``."""
    if value["low"] is None:
        return "–"
    low, high = (f"{100 * value[k]:.{digits}f}" for k in ("low", "high"))
    return f"{100 * value['value']:.{digits}f} % [{low}, {high}]"


def number(value: Interval, digits: int = 2) -> str:
    """``0.61 [0.55, 0.67]``."""
    if value["low"] is None:
        return "–"
    return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def conclusion(experts: Mapping[str, Any]) -> str:
    """One sentence on Observation 1."""
    found = "; ".join(
        f"{level}: {e['verdict']}, the paper has {e['expected']}" for level, e in experts["levels"].items()
    )
    missing = [level for level in EXPECTED if level not in experts["levels"]]
    left_out = f"; no failing spans for {', '.join(missing)}" if missing else ""
    said = {"undecided": "neither reproduced nor contradicted"}.get(experts["observation_1"], experts["observation_1"])
    return f"Observation 1 is {said} ({found}{left_out})"


def separation_lines(experts: Mapping[str, Any]) -> list[str]:
    """Sentences on how well failing spans are told from clean ones: by which type, and where along depth."""
    lines = []
    for level, entry in experts["levels"].items():
        if entry.get("separation"):
            found = ", ".join(f"{k} {number(v)}" for k, v in entry["separation"].items())
            lines.append(f"{level}: AUROC of failing against clean spans by {found}")
    for level, entry in experts.get("depth", {}).items():
        if entry.get("best"):
            at, kind = entry["best"]["block"], entry["best"]["type"]
            where = entry["separation"][kind][experts["blocks"].index(at)]
            lines.append(
                f"{level}: failing and clean spans differ most in the {kind}s of block {at}, AUROC {number(where)}"
            )
    return lines


def print_table(summary: Mapping[str, Any]) -> None:
    """What was chosen per level, how firmly, and where the experts lie."""
    from rich.console import Console
    from rich.table import Table, box

    experts = summary["experts"]
    title = (
        f"experts of block {summary['layer']}, {summary['mode']} attribution\n"
        "K: implied by the selection; overlap: with selections on redrawn problems (of random ones)\n"
        f"{MEASURES[0]} to chance: heads among the first {experts['size']} components, in %"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("level")
    table.add_column("chosen")
    for name in ("K", "overlap", *MEASURES, "chance"):
        table.add_column(name, justify="right")
    table.add_column("experts")
    for level, chosen in summary["levels"].items():
        entry = experts["levels"][level]
        shares = [entry["measures"][m]["heads"]["value"] if m in entry["measures"] else None for m in MEASURES]
        table.add_row(
            level,
            f"{len(chosen['indices'])} {chosen['site'].split(':')[0]}s",
            str(chosen["implied_k"]),
            f"{chosen['jaccard']:.2f} ({chosen['jaccard_by_chance']:.2f})",
            *("–" if v is None else f"{100 * v:.0f}" for v in shares),
            f"{100 * experts['chance']['value']:.1f}",
            entry["verdict"],
        )
    console = Console()
    console.print(table)
    for line in (conclusion(experts), *separation_lines(experts)):
        console.print(line, highlight=False)


def markdown(summary: Mapping[str, Any]) -> str:
    """``experts.md``: the table with all measures, differences between levels, and depth where it was scanned."""
    experts = summary["experts"]
    lines = [
        "# Where the experts lie",
        "",
        f"Block {summary['layer']}, attribution {summary['mode']}, selection {summary['selection']}; joint selections "
        f"of {experts['size']} components. Intervals: 95 %, {experts['draws']} draws of problems. Random selections "
        f"hold {percent(experts['chance'], 1)} heads, and a head stands before a neuron in "
        f"{percent(experts['ahead_by_chance'])} of pairs.",
        "",
        "- raw: selection frequency on failing spans, scores as they are; z: each type to deviation 1 first.",
        "- contrast: z, frequency on failing minus clean spans; effect: how much further ahead failing spans rank a "
        "component, in its own standard deviations. The last one there is gives the verdict.",
        "",
        "| level | problems | measure | heads | enrichment | head before neuron | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for level, entry in experts["levels"].items():
        for measure, m in entry["measures"].items():
            cells = percent(m["heads"], 1), number(m["enrichment"], 1), percent(m["ahead"]), m["verdict"]
            lines.append(f"| {level} | {entry['n_problems']} | {measure} | {' | '.join(cells)} |")
    lines += ["", conclusion(experts) + "."]
    if experts["differences"]:
        named = "; ".join(f"{k} {percent(v, 1)}" for k, v in experts["differences"].items())
        lines += ["", f"Difference of the share of heads between levels: {named}."]
    for level, entry in experts.get("depth", {}).items():
        separated = entry.get("separation", {})
        head = ["block", *(f"{k}s of the joint {entry['size']}" for k in entry["share"])]
        head += [f"AUROC, {k}s" for k in separated]
        lines += ["", f"## {level} by depth", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for i, block in enumerate(experts["blocks"]):
            cells_ = [percent(v[i]) for v in entry["share"].values()] + [number(v[i]) for v in separated.values()]
            lines.append(f"| {block} | {' | '.join(cells_)} |")
    lines += ["", *(f"- {line}." for line in separation_lines(experts))]
    return "\n".join(lines).rstrip() + "\n"
