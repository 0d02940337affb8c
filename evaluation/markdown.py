"""``results.md``: the evaluation's tables as Markdown, to paste where people talk about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neureasoner.evaluation.arms import VANILLA
from neureasoner.evaluation.verdict import caution, comparison, headline, percent, points, sentences

FAILURES = {"intra": "wrong step", "inter": "circles", "instance": "easy question"}


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _header(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


def _interval(value: float, ends: Any, scale: float = 100.0, digits: int = 1, unit: str = "") -> str:
    low, high = ends
    return f"{scale * value:.{digits}f}{unit} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def arms_table(results: Mapping[str, Any]) -> list[str]:
    """Every arm with its intervals, and its paired difference against vanilla."""
    lines = _header("arm", "accuracy, %", "mean tokens", "triggers per answer", "truncated, %", "against vanilla")
    for a in results["arms"]:
        c = comparison(results, a["name"], VANILLA)
        lines.append(
            _row(
                a["name"],
                _interval(a["accuracy"], a["accuracy_ci"]),
                _interval(a["tokens_mean"], a["tokens_ci"], 1, 0),
                f"{a['triggers_per_trace']:.2f}",
                f"{100 * a['truncated']:.1f}",
                f"{points(c)}; {percent(c)}" if c else "–",
            )
        )
    return lines


def _area(entry: Mapping[str, Any] | None) -> str:
    area = (entry or {}).get("test", {}).get("auroc")
    if not area or area.get("value") is None:
        return "–"
    return f".{round(100 * area['value']):02d} [{area['low']:.2f}, {area['high']:.2f}]".replace(".100", "1.00")


def probes_table(results: Mapping[str, Any]) -> list[str]:
    """AUROC on unseen problems: the chosen probe, the paper's spectra, and the controls."""
    lines = _header("level", "shows", "chosen probe", "AUROC", "the paper's spectra", "random channels", "length only")
    for level, entry in results["probes"].items():
        controls = entry.get("controls", {})
        lines.append(
            _row(
                level,
                FAILURES.get(level, level),
                f"{entry.get('features', '–')}, window {entry.get('window', '–')}",
                *(_area(entry.get(key)) for key in ("chosen", "paper")),
                *(_area(controls.get(key)) for key in ("random", "length")),
            )
        )
    return lines


def families_table(results: Mapping[str, Any]) -> list[str]:
    """Accuracy by family, per cent."""
    families = results["problems"]["families"]
    lines = _header("arm", *families)
    for a in results["arms"]:
        cells = [a["by_family"].get(f, {}) for f in families]
        lines.append(_row(a["name"], *(f"{100 * c['accuracy']:.1f}" if c else "–" for c in cells)))
    return lines


def markdown(results: Mapping[str, Any]) -> str:
    """The whole page, its heading left to whoever includes it."""
    n, sampling = results["problems"]["n"], results["sampling"]
    how = (
        f"{n} problems of the split {results['problems']['split']}, temperature {sampling['temperature']}, top-p "
        f"{sampling['top_p']}, at most {sampling['max_new_tokens']} tokens; 95 % intervals and paired differences by "
        f"problem (bootstrap, {results['intervals']['resamples']} draws)."
    )
    said = [f"- {s}" for s in [*sentences(results), caution(results)] if s]
    parts = [f"**{headline(results)}**", "", *said, "", how, "", *arms_table(results)]
    if results["skipped"]:
        parts += ["", *(f"Not run: {name} ({why})." for name, why in results["skipped"].items())]
    parts += ["", "Accuracy by family, per cent:", "", *families_table(results)]
    if results["probes"]:
        parts += ["", "Probes, on problems that neither fitting nor choosing has seen:", "", *probes_table(results)]
    return "\n".join(parts) + "\n"
