"""Tables of ``report.html``, as HTML. What a model, a problem or a settings file wrote is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from neureasoner.evaluation.arms import FULL, VANILLA
from neureasoner.evaluation.cells import value_of
from neureasoner.evaluation.verdict import comparison, percent, points


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _main(arm: Mapping[str, Any]) -> str:
    return ' class="main"' if arm["name"] in (VANILLA, FULL) else ""


def ends(value: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """``[58.1, 64.1]``."""
    return f"[{scale * value[0]:.{digits}f}, {scale * value[1]:.{digits}f}]"


def arms_table(results: Mapping[str, Any]) -> str:
    """The table of arms, as HTML."""
    rows = []
    for a in results["arms"]:
        c = comparison(results, a["name"], VANILLA)
        delta = "".join(
            f'<td class="n {_sign(c, key, good)}">{escape(text(c).replace(" points", "").replace(" tokens", ""))}</td>'
            if c
            else '<td class="n">–</td>'
            for key, good, text in (("accuracy", 1, points), ("tokens", -1, percent))
        )
        votes = f" ×{a['responses_per_answer']:.0f}" if a["responses_per_answer"] > 1 else ""
        rows.append(
            f'<tr{_main(a)}><th scope="row">{escape(a["name"])}{votes}<small>{escape(a["about"])}</small></th>'
            f'<td class="n">{100 * a["accuracy"]:.1f}%<small>{ends(a["accuracy_ci"], 100)}</small></td>'
            f'<td class="n">{a["tokens_mean"]:.0f}<small>{ends(a["tokens_ci"], 1, 0)}</small></td>{delta}'
            f'<td class="n">{100 * a["truncated"]:.1f}%</td><td class="n">{a["triggers_per_trace"]:.2f}</td>'
            f'<td class="n">{a["seconds"]:.0f} s</td><td class="n">{a["n_problems"]} · {a["n_samples"]}</td></tr>'
        )
    head = ["arm", "accuracy", "tokens", "Δ accuracy, points", "Δ tokens", "cut off", "triggers", "time"]
    return _table([*head, "problems · answers"], rows)


def _sign(c: Mapping[str, Any], key: str, good: int) -> str:
    value = c["accuracy_delta"] if key == "accuracy" else c["tokens_relative"]
    if not c[f"{key}_shown"]:
        return ""
    return "up" if value * good > 0 else "down"


def probes_table(results: Mapping[str, Any]) -> str:
    """What watches each failure, as HTML; nothing when there is nothing."""
    rows = []
    for level, p in results["probes"].items():
        test = (p.get("chosen") or {}).get("test") or p.get("test")
        test, cells = test if isinstance(test, Mapping) else {}, []
        for key in ("auroc", "recall", "precision", "false_alarms_per_1000_tokens"):
            value = value_of(test.get(key))
            ci = f"<small>[{value[1][0]:.2f}, {value[1][1]:.2f}]</small>" if value and value[1] else ""
            cells.append(f'<td class="n">{value[0]:.2f}{ci}</td>' if value else '<td class="n">–</td>')
        site = results["neurons"].get(level, {}).get("site") or "–"
        features = p.get("features", (p.get("chosen") or {}).get("name", "–"))
        how = f"window {p.get('window', '–')}, split {p.get('split') or 'by problem'}, seed {p.get('seed', '–')}"
        rows.append(
            f'<tr><th scope="row">{escape(level)}</th><td>{escape(str(features))}<small>{escape(how)}</small></td>'
            f'{"".join(cells)}<td class="site"><code>{escape(site)}</code></td></tr>'
        )
    head = ["failure", "features", "AUROC", "recall", "precision", "false alarms / 1,000 tokens", "neurons or heads"]
    return _table(head, rows) if rows else ""


def families_table(results: Mapping[str, Any]) -> str:
    """Accuracy and tokens of every arm in every family, as HTML."""
    families, rows = results["problems"]["families"], []
    for a in results["arms"]:
        cells = []
        for family in families:
            f = a["by_family"].get(family)
            ci = f and f"<small>{ends(f['accuracy_ci'], 100)} · {f['tokens_mean']:.0f} tokens</small>"
            cells.append(f'<td class="n">{100 * f["accuracy"]:.1f}%{ci}</td>' if f else '<td class="n">–</td>')
        rows.append(f'<tr{_main(a)}><th scope="row">{escape(a["name"])}</th>{"".join(cells)}</tr>')
    return _table(["arm", *families], rows)


def costs_table(results: Mapping[str, Any]) -> str:
    """What an answer of every arm costs, as HTML."""

    def seconds(arm: Mapping[str, Any], key: str) -> str:
        value, between = arm.get(key), arm.get(f"{key}_ci")
        if value is None or between is None:
            return '<td class="n">–</td>'
        low, high = (f"{x:.2f}" if x is not None else "∞" for x in between)
        return f'<td class="n">{value:.2f}<small>[{low}, {high}]</small></td>'

    rows = [
        f'<tr{_main(a)}><th scope="row">{escape(a["name"])}</th><td class="n">{a["forced_mean"]:.1f}</td>'
        f'<td class="n">{a["probe_tokens_mean"]:.1f}</td>{seconds(a, "seconds_per_problem")}'
        f"{seconds(a, 'seconds_per_solved')}{seconds(a, 'speedup')}</tr>"
        for a in results["arms"]
        if "forced_mean" in a
    ]
    head = ["arm", "forced tokens", "probe tokens", "seconds per response", "seconds per solved problem"]
    head += ["times faster than vanilla per solved problem"]
    return _table(head, rows) if rows else ""


def curves_table(results: Mapping[str, Any]) -> str:
    """Pass@k and Cons@k of the arms that drew several samples a problem, as HTML; nothing where none did."""
    names = {"pass_at": "Pass", "cons": "Cons"}
    heads = {key: list(dict.fromkeys(k for a in results["arms"] for k in a.get(key, {}))) for key in names}
    if not any(heads.values()):
        return ""
    rows = []
    for a in results["arms"]:
        cells = ""
        for key, sizes in heads.items():
            for k in sizes:
                e = a.get(key, {}).get(k)
                found = f"{100 * e['accuracy']:.1f}%<small>{ends(e['accuracy_ci'], 100)}</small>" if e else "–"
                cells += f'<td class="n">{found}</td>'
        rows.append(f'<tr{_main(a)}><th scope="row">{escape(a["name"])}</th>{cells}</tr>')
    return _table(["arm", *(f"{names[key]}@{k}" for key, sizes in heads.items() for k in sizes)], rows)
