"""Fluctuation: planted pictures and their verdicts, which continuations are compared, the stage from end to end."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.pairs import Pair
from neureasoner.probes.fluctuation import statistics as fs
from neureasoner.probes.fluctuation.config import FluctuationConfig
from neureasoner.probes.fluctuation.fluctuation import (
    Match,
    Side,
    analyse,
    fluctuation,
    matches_of_pairs,
    matches_of_traces,
    one_partner,
    record_windows,
    usable,
)
from neureasoner.sites import read_sites
from neureasoner.steps import segment
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace, write_rows

PARTS = ("Okay, let me think about {} + {} = 42", "First I try {} * {} - 5 = 19", "Tom has {} apples and buys {} more")


def config(**more):
    base = {"model": "m", "neurons": "n", "out": "o", "pairs": "p", "bootstrap": 200, "permutations": 999}
    return FluctuationConfig(**(base | more))


def trace(tokenizer, problem, seed, steps=4, name="", labels=None):
    rng = np.random.default_rng(seed)
    text = "".join(
        PARTS[i % 3].format(*rng.integers(10, 99, 2)) + " more" * rng.integers(9) + ".\n\n" for i in range(steps)
    )
    ids = tokenizer(text + "</think>\n\nDone.", add_special_tokens=False)["input_ids"]
    prompt = tokenizer(f"<think>\nQuestion {problem}", add_special_tokens=False)["input_ids"]
    found, thinking = segment(ids, tokenizer)
    meta = {"thinking_tokens": thinking}
    row = Trace(
        name or f"{problem}#{seed}", Problem(problem, "f", 1, "q", "a"), prompt, ids, "", found, True, labels, [], meta
    )
    row.response = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return row


def judged(tokenizer, problem, seed, wrong=None, loop=None, correct=True, steps=6):
    labels = Labels(correct, "1", IntraLabel(wrong is not None, step=wrong), InterLabel(loop is not None, steps=loop))
    return trace(tokenizer, problem, seed, steps, labels=labels)


def fake(n, tokens=64, level="intra", steps=4):
    """Matches whose traces hold no text, for windows made by hand."""
    ends = tuple(tokens * (i + 1) // steps for i in range(steps))

    def side(i):
        return Side(Trace(f"t{i}", Problem(f"p{i}", "f", 1, "q", "a"), [1], [1], "", [], True), 0, ends)

    return [Match(f"m{i}", level, side(i), side(i)) for i in range(n)]


# --- verdicts ----------------------------------------------------------------------------------------------------


def planted(level, n=40, seed=0, chosen=True):
    """Windows in which the failing side of the chosen channels shows the paper's picture, the random ones nothing."""
    rng = np.random.default_rng(seed)
    t = np.arange(64)
    extra = {
        "intra": 12.0 * (t % 29 == 11),
        "inter": 1.5 + 1.5 * np.sin(2 * np.pi * t / 16),
        "instance": 3.0 * np.exp(-t / 12),
    }[level]
    noise = lambda: [np.abs(rng.standard_normal((64, 6))).astype(np.float32) for _ in range(n)]  # noqa: E731
    windows = {"chosen": (noise(), noise()), "random": (noise(), noise())}
    if chosen:
        for x in windows["chosen"][0]:
            x += extra[:, None].astype(np.float32)
    return fake(n, 64, level), windows


def verdicts(level, **more):
    entry, single = analyse(level, *planted(level, **more), 2, config())
    levels = {level: entry}
    fs.correct(levels)
    return entry, single, fs.verdict(level, entry["statistics"])


@pytest.mark.parametrize("level", ["intra", "inter", "instance"])
def test_planted_pictures_hold_on_chosen_channels_only(level):
    entry, single, verdict = verdicts(level, seed=1)
    assert verdict["status"] == "holds" and verdict["stronger_than_random"] >= 2
    assert f"{fs.PICTURE[level]}: holds: " in verdict["sentence"]
    assert f"{verdict['stronger_than_random']} of these more so than on random channels" in verdict["sentence"]
    for name, s in entry["statistics"].items():
        assert s["random"]["verdict"] == "undecided" and s["n"] == 40
        d = s["chosen"]["d_z"]
        if s["chosen"]["verdict"] == "as drawn":
            assert s["chosen"]["p_holm"] < 0.05 and d["low"] <= d["value"] <= d["high"], name
            assert np.sign(d["value"]) == fs.EXPECTED[level][name]
    assert len(single["chosen"][fs.SIDES[level][0]]) == 3 == len(entry["examples"])
    curve = entry["curves"]["chosen"]["relative"][fs.SIDES[level][1]]
    assert len(curve["mean"]) == 50 and np.abs(curve["mean"]).max() < 0.6  # clean z is about 0


@pytest.mark.parametrize("level", ["intra", "inter", "instance"])
def test_noise_holds_no_picture_and_the_reverse_is_refused(level):
    entry, _, verdict = verdicts(level, chosen=False, seed=3)
    assert verdict["status"] != "holds" and verdict["stronger_than_random"] == 0
    matches, windows = planted(level)
    both = {"chosen": windows["chosen"], "random": windows["chosen"]}
    entry, _ = analyse(level, matches, both, 0, config())
    fs.correct({level: entry})
    found = fs.verdict(level, entry["statistics"])  # it holds, but not because of the selection
    assert found["status"] == "holds" and "none of these more so than on random channels" in found["sentence"]
    swapped = {k: (b, a) for k, (a, b) in windows.items()}
    entry, _ = analyse(level, matches, swapped, 0, config())
    fs.correct({level: entry})
    assert fs.verdict(level, entry["statistics"])["status"] == "does not hold"
    assert fs.verdict(level, entry["statistics"])["sentence"].count("does not hold") == 1


def test_many_pairs_without_effect_do_not_hold():
    entry, _, verdict = verdicts("intra", n=500, chosen=False)
    assert {s["chosen"]["verdict"] for s in entry["statistics"].values()} == {"undecided"}
    assert verdict["status"] == "does not hold"  # every interval lies below a small effect
    assert verdicts("intra", n=12, chosen=False)[2]["status"] == "not decided"


def test_statistics_undefined_everywhere_stay_out_of_holm():
    matches = fake(30, 64, "inter", steps=1)  # one paragraph: its length is no lag
    entry, _ = analyse("inter", matches, planted("inter", n=30)[1], 0, config())
    fs.correct({"inter": entry})
    s = entry["statistics"]["acf_paragraph"]
    assert s["n"] == 0 and s["chosen"]["p_holm"] is None and s["chosen"]["d_z"]["value"] is None
    others = [entry["statistics"][k]["chosen"] for k in ("r_dom", "acf_peak")]
    assert [e["p_holm"] for e in others] == pytest.approx(fs.holm([e["p"] for e in others]))
    assert "–" not in fs.verdict("inter", entry["statistics"])["sentence"]


def test_windows_are_cut_to_equal_length():
    matches, windows = planted("intra", n=30)
    longer = [np.concatenate([x, 50 + x]) for x in windows["chosen"][1]]
    matches = [Match(m.id, m.level, m.failing, Side(m.clean.trace, 0, (*m.clean.ends, 128))) for m in matches]
    entry, _ = analyse("intra", matches, {**windows, "chosen": (windows["chosen"][0], longer)}, 0, config())
    same, _ = analyse("intra", *planted("intra", n=30), 0, config())
    for name in ("crest", "kurtosis", "r_hf"):  # peak z has another reference: the clean side's tokens
        assert entry["statistics"][name]["chosen"]["mean"] == same["statistics"][name]["chosen"]["mean"]
    assert entry["tokens"] == {"failing": 64, "clean": 128, "compared": 64}
    assert len(entry["curves"]["chosen"]["absolute"]["clean"]["mean"]) == 128  # but curves show whole windows


# --- which continuations --------------------------------------------------------------------------------------------


def test_sides_are_cut_at_the_last_step_compared(tiny_tokenizer):
    t = trace(tiny_tokenizer, "p", 0, steps=5)
    side = Side.of(t, t.steps[1].token_start, 2)
    assert side.ends == tuple(t.steps[i].token_end - t.steps[1].token_start for i in (1, 2))
    assert len(side.trace.response_ids) == t.steps[2].token_end == side.begin + side.tokens
    assert tiny_tokenizer.decode(side.trace.response_ids) == side.trace.response
    assert Side.of(t, t.steps[3].token_start, 9).tokens == t.steps[4].token_end - t.steps[3].token_start
    assert Side.of(t, len(t.response_ids), 1).tokens == 0


def test_pairs_turn_instance_pairs_round(tiny_tokenizer, tmp_path):
    a, b = trace(tiny_tokenizer, "p", 0), trace(tiny_tokenizer, "p", 1)
    begin = 0
    rows = [Pair("x", "intra", begin, 1, 1, a, b), Pair("y", "instance", 0, 3, 1, a, b)]
    write_rows(tmp_path / "pairs.jsonl", [asdict(r) for r in rows])
    intra, instance = matches_of_pairs(tmp_path / "pairs.jsonl")
    assert (intra.failing.trace.id, intra.clean.trace.id) == (a.id, b.id)
    assert (instance.failing.trace.id, instance.clean.trace.id) == (b.id, a.id)  # easy first
    assert instance.failing.tokens == b.steps[2].token_end and instance.tokens == min(
        x.steps[2].token_end for x in (a, b)
    )


def test_traces_meet_clean_ones_of_their_problem(tiny_tokenizer):
    rows = [
        judged(tiny_tokenizer, "p", 0, wrong=2),
        judged(tiny_tokenizer, "p", 1),
        judged(tiny_tokenizer, "p", 2, loop=(1, 5)),
        judged(tiny_tokenizer, "p", 3, steps=4),
        judged(tiny_tokenizer, "q", 4, wrong=0),  # no clean trace
        judged(tiny_tokenizer, "r", 5, loop=(2, 6)),
        judged(tiny_tokenizer, "r", 6, steps=3),  # too short
        judged(tiny_tokenizer, "s", 7, correct=False),  # hard; p and the rest are easy
    ]
    found, without = matches_of_traces(rows, [], 3)
    by = {(m.level, m.failing.trace.id): m for m in found}
    assert without == {"intra": 1, "inter": 1}
    intra, inter = by["intra", "p#0"], by["inter", "p#2"]
    assert intra.failing.begin == rows[0].steps[2].token_start and len(intra.failing.ends) == 1 == len(intra.clean.ends)
    assert intra.clean.begin == next(r for r in rows if r.id == intra.clean.trace.id).steps[2].token_start
    assert inter.clean.trace.id == "p#1" and len(inter.clean.ends) == 4 == len(inter.failing.ends)
    instance = [m for m in found if m.level == "instance"]
    assert [m.clean.trace.id for m in instance] == ["s#7"] and instance[0].failing.trace.problem.id != "s"
    rows[0].labels = None
    with pytest.raises(UserError, match="run data judge"):
        matches_of_traces(rows, [], 3)


def test_a_problem_keeps_its_first_partner():
    sides = {p: Side(Trace(p, Problem(p, "f", 1, "q", "a"), [1], [1], "", [], True), 0, (20,)) for p in "abcdx"}
    pairs = ["ab", "cb", "cd", "ab", "ad", "xx", "xx"]
    kept = one_partner(Match(str(i), "instance", sides[f], sides[c]) for i, (f, c) in enumerate(pairs))
    assert [m.id for m in kept] == ["0", "2", "3", "5", "6"]


def test_what_is_left_out_is_counted():
    matches = fake(4, 40) + fake(2, 15)
    kept, counts = usable(matches, {"p0"}, config())
    assert len(kept) == 4 and list(counts.values()) == [6, 0, 2, 0]
    kept, counts = usable(matches, {"p0"}, config(unseen=True))
    assert len(kept) == 3 and list(counts.values()) == [6, 2, 1, 0]


def test_windows_are_the_continuation_as_the_model_read_it(make_model, tiny_tokenizer):
    model = make_model()
    rows = [trace(tiny_tokenizer, "p", s, steps=4) for s in range(4)]
    begins = [t.steps[1].token_start for t in rows]
    sides = [Side.of(t, b, 2) for t, b in zip(rows, begins, strict=True)]
    sites = {"chosen": "neuron:1[0,7]", "random": "head:1[2]"}
    ticks = []
    matches = [Match("a", "intra", sides[0], sides[1]), Match("b", "intra", sides[2], sides[3])]
    windows = record_windows(model, tiny_tokenizer, matches, sites, 3, lambda: ticks.append(1))
    assert len(ticks) == 4
    for i, (side, t, begin) in enumerate(zip(sides, rows, begins, strict=True)):
        got = {}
        ids = torch.tensor([[*t.prompt_ids, *t.response_ids]])  # the whole trace, alone
        with torch.inference_mode(), read_sites(model, sites.values(), lambda n, v, g=got: g.update({n: v[0]})):
            model(ids)
        for key, site in sites.items():
            first = len(t.prompt_ids) + begin
            want = got[site][first : first + side.tokens].abs().numpy()
            np.testing.assert_allclose(windows[key][i % 2][i // 2], want, atol=2e-5)


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory, make_model, tiny_tokenizer):
    """A model, neurons of it, and pairs: 24 intra, 4 instance, one intra too short, none of inter."""
    root = tmp_path_factory.mktemp("fluctuation")
    make_model().save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    from neureasoner.models import fingerprint, load

    neurons = {
        "kind": "neurons",
        "model": "somewhere",
        "fingerprint": fingerprint(load(str(root / "model"))[0]),
        "layer": 1,
        "levels": {
            "intra": {"site": "neuron:1[2,5,9]", "indices": [5, 2, 9]},
            "inter": {"site": "head:1[0,1]", "indices": [1, 0]},
            "instance": {"site": "neuron:1[3,4]", "indices": [3, 4]},
        },
        "random": {"intra": "neuron:1[10,20,30]", "inter": "head:1[2,3]", "instance": "neuron:1[3,4]"},
        "problems": ["p0", "p1", "elsewhere"],
    }
    (root / "neurons.json").write_text(json.dumps(neurons))
    rows = []
    for i in range(24):
        rows.append(
            Pair(f"p{i}/intra", "intra", 0, 2, 1, *(trace(tiny_tokenizer, f"p{i}", 50 + 2 * i + j) for j in (0, 1)))
        )
    for i in range(4):
        sides = (trace(tiny_tokenizer, f"{side}{i}", 200 + i) for side in ("hard", "easy"))
        rows.append(Pair(f"f-{i}/instance", "instance", 0, 3, 1, *sides))
    short = [trace(tiny_tokenizer, "p3", 90 + j) for j in (0, 1)]
    rows.append(Pair("short/intra", "intra", len(short[0].response_ids), 1, 1, *short))
    write_rows(root / "pairs.jsonl", rows)
    return root


def run(root, out="out", **more):
    base = {"model": str(root / "model"), "neurons": str(root / "neurons.json"), "out": str(root / out)}
    pairs = {} if "traces" in more else {"pairs": str(root / "pairs.jsonl")}
    return fluctuation(FluctuationConfig(**(base | pairs | {"bootstrap": 100, "permutations": 99} | more)))


def test_stage(work, capsys):
    summary = run(work)
    printed = capsys.readouterr().out
    text = (work / "out" / "fluctuation.json").read_text()
    results = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in fluctuation.json"))
    assert list(results["levels"]) == ["intra", "instance"] == list(summary["levels"])
    assert any(w.startswith("inter: no pair to compare (none found)") for w in results["warnings"])
    assert any("instance: 4 problems are few" in w for w in results["warnings"])
    assert {"seed", "command", "version", "intervals", "fingerprint"} <= set(results)
    intra = results["levels"]["intra"]
    assert intra["pairs"] == 24 == intra["problems"] and intra["seen"] == 2 and intra["lead"] == 5
    assert intra["left_out"]["shorter than 16 tokens on a side"] == 1
    assert set(intra["statistics"]) == set(fs.EXPECTED["intra"])
    flat = results["levels"]["instance"]["statistics"]["slope"]  # its random channels are the chosen ones
    assert flat["chosen"]["d_z"] == flat["random"]["d_z"] and flat["chosen_minus_random"]["value"] == 0
    page = (work / "out" / "fluctuation.md").read_text()
    for wanted in (
        "peak z",
        "Cliff's delta",
        "24 pairs of 24 problems (25 found, 1 shorter than 16",
        "Seed 0",
        "cut to the",
    ):
        assert wanted in page
    assert intra["verdict"]["sentence"] in page and "spikes:" in printed and "warning" in printed
    for name in ("time", "frequency", "effects"):
        assert (work / "out" / "intra" / f"{name}.png").stat().st_size > 10_000
        assert f"intra/{name}.png" in page
    assert run(work) == summary and "peak z" in capsys.readouterr().out  # a second run only prints


def test_stage_on_traces(work, tiny_tokenizer):
    rows = [judged(tiny_tokenizer, f"p{i}", 300 + 2 * i + j, wrong=None if j else 1) for i in range(8) for j in (0, 1)]
    rows.append(judged(tiny_tokenizer, "alone", 400, wrong=1))
    write_rows(work / "traces.jsonl", rows)
    neurons = json.loads((work / "neurons.json").read_text())
    (work / "half.json").write_text(json.dumps(neurons | {"levels": {"intra": neurons["levels"]["intra"]}}))
    half = {"neurons": str(work / "half.json")}
    summary = run(work, "traces", traces=str(work / "traces.jsonl"), unseen=True, **half)
    entry = summary["levels"]["intra"]
    assert list(summary["levels"]) == ["intra"] and entry["left_out"]["failures without a clean trace"] == 1
    left = entry["left_out"]
    assert left["on problems the channels were selected on"] == 2  # p0, p1
    assert entry["pairs"] + left["shorter than 16 tokens on a side"] == 6
    assert "half.json names no channels for it" in summary["warnings"][1] and summary["warnings"][1][:9] == "instance:"
    assert "traces of one problem" in (work / "traces" / "fluctuation.md").read_text()


def test_bad_input(work, tiny_tokenizer, make_model):
    with pytest.raises(UserError, match=r"nothing to compare: intra: no pair .*25 shorter than 5000 tokens"):
        run(work, "none", min_tokens=5000)
    make_model(seed=1).save_pretrained(work / "other")
    tiny_tokenizer.save_pretrained(work / "other")
    with pytest.raises(UserError, match=r"selected on model 'somewhere'.*run probes locate on this model"):
        run(work, "wrong", model=str(work / "other"))
    (work / "rcn.json").write_text(json.dumps({"kind": "rcn"}))
    with pytest.raises(UserError, match=r"not a neurons\.json of probes locate"):
        run(work, "rcn", neurons=str(work / "rcn.json"))
    with pytest.raises(UserError, match="does not exist"):
        run(work, "missing", pairs=str(work / "nowhere.jsonl"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pairs": ""}, "either 'pairs'"),
        ({"traces": "t"}, "one of the two"),
        ({"nothinking": "t"}, "only with traces"),
        ({"min_tokens": 15}, "'min_tokens' must be at least 16"),
        ({"bootstrap": 10}, "'bootstrap' must be at least 100"),
        ({"permutations": 9}, "'permutations' must be at least 99"),
        ({"examples": 0}, "'examples' must be at least 1"),
    ],
)
def test_settings_are_checked(more, message):
    with pytest.raises(UserError, match=message):
        config(**more)
