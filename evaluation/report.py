"""``report.html``: one file, no network, light and dark. Numbers come from ``results.json``, examples from ``traces/``.

Everything that a model or a problem wrote is escaped here (HTML) or set as text by the page's script (viewer).
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json, write_text
from neureasoner.data_builders.browse import embed
from neureasoner.evaluation import charts
from neureasoner.evaluation.arms import FULL, VANILLA, VOTE
from neureasoner.evaluation.cells import value_of
from neureasoner.evaluation.examples import KINDS, OF_STEPS, UNJUDGED, first_samples, main_pair, pick, thresholds, view
from neureasoner.evaluation.markdown import source
from neureasoner.evaluation.report_tables import (
    arms_table,
    costs_table,
    curves_table,
    ends,
    families_table,
    probes_table,
)
from neureasoner.evaluation.run_folder import load_results, load_traces
from neureasoner.evaluation.verdict import arm_of, caution, headline, sentences
from neureasoner.evaluation.viewer.config import ReportConfig
from neureasoner.evaluation.viewer.details import Details
from neureasoner.traces import Trace

SHOWN_BY_DIFFICULTY = (VANILLA, "sft_only", "random_trigger", FULL, "oracle_trigger")


def write_report(out: str | Path, cap: int = 600, probes_results: str = "") -> Path:
    """Write ``report.html`` and ``figures/*.svg`` from a folder that holds ``results.json`` and ``traces/``."""
    results = load_results(out)
    traces = load_traces(out, [a["name"] for a in results["arms"]])
    figures = draw(results, traces, probes_results)
    for name, svg in figures.items():
        file = re.sub(r"[^\w-]", "_", name)  # families and levels have the names that files gave them
        write_text(Path(out) / "figures" / f"{file}.svg", svg + "\n")
    path = Path(out) / "report.html"
    write_text(path, page(results, traces, figures, cap, Details.beside(out)))
    return path


def report(config: ReportConfig) -> dict[str, Any]:
    """Stage ``evaluation report``: the page once more, from what is in the folder."""
    mark = Path(config.run) / "stage.json"
    found = read_json(mark).get("config", {}).get("probes_results", "") if mark.is_file() else ""
    given = config.probes_results or (found if Path(found).is_file() else "")
    path = write_report(config.run, config.traces, given)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return {"report": str(path)}


def draw(results: Mapping[str, Any], traces: Mapping[str, Sequence[Trace]], probes_results: str = "") -> dict[str, str]:
    """All figures by name."""
    arms = results["arms"]
    figures = {"tradeoff": charts.tradeoff(arms)}
    chosen = [a for a in arms if a["name"] in SHOWN_BY_DIFFICULTY]
    for family in results["problems"]["families"]:
        rows = [{"name": a["name"], "levels": a["by_family_difficulty"].get(family, {})} for a in chosen]
        if any(r["levels"] for r in rows):
            figures[f"difficulty_{family}"] = charts.by_difficulty(family, [r for r in rows if r["levels"]])
    lengths = [(name, [len(t.response_ids) for t in rows]) for name, rows in traces.items() if name != VOTE]
    if lengths:
        figures["tokens"] = charts.spread_rows(lengths, "tokens per response")
    positions: dict[str, list[float]] = defaultdict(list)
    for trace in traces.get(FULL, []):
        for event in trace.events:
            if not event["suppressed"]:
                positions[event["rule"]].append(event["token"])
    if positions:
        figures["positions"] = charts.histogram(sorted(positions.items()), "response token", "interventions of full")
    return figures | _probe_figures(results, probes_results)


def _probe_figures(results: Mapping[str, Any], probes_results: str) -> dict[str, str]:
    figures = {}
    for level, probe in results["probes"].items():
        found = [("chosen", probe.get("chosen"), True), ("paper", probe.get("paper"), True)]
        found += [(name, entry, False) for name, entry in probe.get("controls", {}).items()]
        rows = []
        for name, entry, ours in found:
            value = value_of((entry or {}).get("test", {}).get("auroc"))
            if entry and value:
                label = {"random": "control: random channels", "length": "control: length, position"}.get(name, name)
                rows.append((f"{label} ({entry['name']})" if ours else label, *value, ours))
        if rows:
            figures[f"auroc_{level}"] = charts.bars(rows, f"test AUROC · {level}", 0.0, 1.0)
        scores = Path(probes_results).parent / level / "scores.safetensors" if probes_results else None
        if scores is not None and scores.is_file():
            figures[f"roc_{level}"] = _roc(scores, level)
    return figures


def _roc(file: Path, level: str) -> str:
    from neureasoner.artifacts import read_tensors
    from neureasoner.probes.detectors.metrics import roc

    tensors, curves = read_tensors(file)[0], []
    for name in ("chosen", "paper", "random", "length"):
        y, score = tensors.get(f"{name}.y"), tensors.get(f"{name}.score")
        if y is not None and score is not None and 0 < int((y == 1).sum()) < len(y):
            false, true = roc(y.numpy(), score.numpy())
            keep = range(0, len(false), max(1, len(false) // 200))
            curves.append((name, [(float(false[i]), float(true[i])) for i in [*keep, len(false) - 1]]))
    return charts.roc(curves, level)


def _curves(results: Mapping[str, Any]) -> str:
    table = curves_table(results)
    if not table:
        return ""
    hint = "Several samples of a problem together: one of them right (Pass@k), or their vote (Cons@k, costs k answers)."
    return f'<p class="hint">{hint}</p><div class="scroll">{table}</div>'


def _provenance(results: Mapping[str, Any]) -> str:
    s, p, i = results["sampling"], results["problems"], results["intervals"]
    rows = {
        "command": results["command"],
        "model": f"{results['model']} (vanilla: {results['base'] or '–'})",
        "problems": f"{p['file']}: {p['n']}, split {p['split']}, {', '.join(p['families'])}",
        "protocol": " ".join(source(results)),
        "sampling": f"temperature {s['temperature']}, top-p {s['top_p']}, cap {s['max_new_tokens']} tokens",
        "seeds": f"sampling {results['seeds']['sampling']}, bootstrap {results['seeds']['bootstrap']}; "
        f"{results['seeds']['pairing']}",
        "intervals": f"{i['level']:.0%}, {i['method']}, {i['resamples']:,} resamples; {i['truncated']}",
        "device": results.get("device"),
        "versions": ", ".join(f"{k} {v}" for k, v in results["versions"].items() if v),
    }
    if results.get("votes"):
        rows["vote"] = f"{results['votes']['k']} no_thinking answers a vote, so that its mean tokens match full's"
    if results.get("random_rates"):
        rates = ", ".join(f"{k} {v:.4f}" for k, v in results["random_rates"].items())
        rows["coin of random_trigger"] = f"{rates} per step at which the rule could win, measured on full"
    for name, reason in results["skipped"].items():
        rows[f"arm {name} left out"] = reason
    return "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in rows.items() if v)


def _asset(name: str) -> str:
    return files("neureasoner.evaluation").joinpath(name).read_text(encoding="utf-8")


def _figure(svg: str, caption: str, wide: bool = False) -> str:
    return f"<figure{' class=wide' if wide else ''}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _gallery(figures: Mapping[str, str], prefixes: Mapping[str, str]) -> str:
    return "".join(
        _figure(svg, caption) for p, caption in prefixes.items() for name, svg in figures.items() if name.startswith(p)
    )


def islands(
    results: Mapping[str, Any], traces: Mapping[str, Sequence[Trace]], cap: int, details: Details | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the viewer lists and filters by, and the traces, each of which it parses when it is shown."""
    first = first_samples(traces)
    problems = pick(traces, cap)
    rank = {problem: i for i, problem in enumerate(problems)}
    kept = [(arm, t) for arm, rows in first.items() for t in rows if t.problem.id in rank]
    kept.sort(key=lambda pair: rank[pair[1].problem.id])
    seen = [view(t) | {"arm": arm, "detail": details.of(arm, t) if details else None} for arm, t in kept]
    keys = ("arm", "problem", "family", "difficulty", "right", "kinds", "judged")
    rows = [
        {"i": i, **{k: v[k] for k in keys}, "question": v["question"][:120], "rules": [e[0] for e in v["events"]]}
        for i, v in enumerate(seen)
    ]
    index = {
        "rows": rows,
        "arms": list(first),
        "pair": main_pair(list(first)),
        "kinds": KINDS,
        "of_steps": OF_STEPS,
        "unjudged": UNJUDGED,
        "limits": thresholds(traces),
        "levels": details.levels if details else {},
        "thresholds": details.meta["thresholds"] if details else {},
        "frequencies": details.meta["frequencies"] if details else [],
    }
    return index, seen


def page(
    results: Mapping[str, Any],
    traces: Mapping[str, Sequence[Trace]],
    figures: Mapping[str, str],
    cap: int,
    details: Details | None = None,
) -> str:
    """The finished page."""
    index, seen = islands(results, traces, cap, details)
    total = sum(len(rows) for rows in traces.values())
    full, vanilla = arm_of(results, FULL), arm_of(results, VANILLA)
    cards = "".join(
        f'<div class="card {"full" if a is full else ""}"><span>{escape(a["name"])}</span>'
        f"<b>{100 * a['accuracy']:.1f}%</b><i>right {ends(a['accuracy_ci'], 100)}</i>"
        f"<b>{a['tokens_mean']:.0f}</b><i>tokens {ends(a['tokens_ci'], 1, 0)}</i></div>"
        for a in (vanilla, full)
        if a
    )
    p = results["problems"]
    lead = f"{p['n']} {'unseen ' if p['split'] == 'test' else ''}problems ({', '.join(p['families'])}), "
    lead += f"{len(results['arms'])} arms, {results['seeds']['samples']} answer(s) per problem and arm."
    shown = len({row["problem"] for row in index["rows"]})
    note = f"{len(seen)} of {total} traces are embedded: {shown} problems, the first sample of every arm"
    note += " (votes left out)." if VOTE in traces else "."
    if not details:
        note += " Their neurons were not recorded (`neureasoner evaluation details` does it)."
    script = _asset("viewer/plots.js") + _asset("report.js")  # no other one may run, whatever a trace says
    parts = {
        "style": _asset("report.css"),
        "script": script,
        "hash": "sha256-" + b64encode(sha256(script.encode()).digest()).decode(),
        "headline": escape(headline(results)),
        "lead": escape(lead),
        "caution": f'<p class="caution">{escape(caution(results))}</p>' if caution(results) else "",
        "cards": cards,
        "sentences": "".join(f"<li>{escape(s)}</li>" for s in sentences(results)),
        "arms": arms_table(results),
        "costs": costs_table(results),
        "curves": _curves(results),
        "families": families_table(results),
        "tradeoff": _figure(figures["tradeoff"], "Each point is an arm; bars are 95% intervals.", wide=True),
        "difficulty": _gallery(figures, {"difficulty_": "Accuracy by difficulty; bars are 95% intervals."}),
        "figures": _gallery(
            figures,
            {
                "tokens": "Box: middle half; line: 5% to 95%; tick: median.",
                "positions": "Where the full arm stepped in.",
            },
        ),
        "legend": _legend([a["name"] for a in results["arms"] if a["name"] in SHOWN_BY_DIFFICULTY]),
        "probes": probes_table(results),
        "probe_figures": _gallery(
            figures, {"auroc_": "Test problems; controls in grey.", "roc_": "Test problems; green is the chosen probe."}
        ),
        "provenance": _provenance(results),
        "note": escape(note),
        "data": embed(index),
        "traces": "".join(
            f'<script type="application/json" id="t{i}">{embed(v)}</script>\n' for i, v in enumerate(seen)
        ),
    }
    html = _asset("report_template.html")
    head, *rest = html.split("{{")  # one pass, so that text of a trace is never taken for a place to fill
    filled = head + "".join(parts[key] + tail for key, tail in (piece.split("}}", 1) for piece in rest))
    return filled.encode("utf-8", "replace").decode()  # half a surrogate pair is no text


def _legend(names: Sequence[str]) -> str:
    return "".join(
        f'<span><i style="background:{charts.colour(n, i)}"></i>{escape(n)}</span>' for i, n in enumerate(names)
    )
