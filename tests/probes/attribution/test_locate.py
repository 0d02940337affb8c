"""``probes locate`` on a random model: what it writes and prints, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from neureasoner.config import parse
from neureasoner.errors import UserError
from neureasoner.probes.attribution import locate as module
from neureasoner.probes.attribution.locate import locate
from neureasoner.probes.config import LocateConfig
from neureasoner.sites import Site
from neureasoner.steps import segment
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace, write_rows

LEVELS = ["intra", "inter", "instance"]


def judged_traces(tokenizer, n=28, seed=0):
    """Two traces a problem, easy and hard ones in turn: the first clean, the second wrong or looping."""
    rng = np.random.default_rng(seed)
    fill = lambda text: text.format(*rng.integers(10, 99, 2)) + ".\n\n"  # noqa: E731
    out = []
    for p in range(n):
        for s in range(2):
            parts = [fill("First I try {} * {} = 19") for _ in range(4)]
            wrong = 2 if s and p % 4 < 2 else None
            loop = (1, 4) if s and p % 4 >= 2 else None
            ids = tokenizer("".join(parts) + "</think>\n\nDone.", add_special_tokens=False)["input_ids"]
            steps, thinking = segment(ids, tokenizer)
            intra, inter = IntraLabel(wrong is not None, step=wrong), InterLabel(loop is not None, steps=loop)
            prompt = tokenizer(f"<think>\nQuestion {p}", add_special_tokens=False)["input_ids"]
            meta = {"thinking_tokens": thinking}
            labels, problem = Labels(p % 2 == 0, "1", intra, inter), Problem(f"p{p}", "f", 1, "q", "a")
            out.append(Trace(f"p{p}#{s}", problem, prompt, ids, tokenizer.decode(ids), steps, True, labels, meta=meta))
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_model, tiny_tokenizer):
    root = tmp_path_factory.mktemp("locate")
    make_model(num_hidden_layers=3).save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    write_rows(root / "traces.jsonl", judged_traces(tiny_tokenizer))
    return root


def settings(root, out, **more):
    base = {"model": str(root / "model"), "traces": str(root / "traces.jsonl"), "out": str(out), "mode": "direct"}
    small = {"neurons": 6, "heads": 2, "max_traces": 8, "first_steps": 2, "bootstrap": 30}
    return LocateConfig(**(base | small | more))


def test_what_is_written_and_said(root, tmp_path, capsys):
    done = locate(settings(root, tmp_path / "n", blocks=["all"]))
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "n" / "neurons.json").read_text())
    assert found["kind"] == "neurons" and found["layer"] == 1 and found["selection"] == "worst_rank"
    assert list(found["levels"]) == LEVELS == list(found["experts"]["levels"]) == list(found["experts"]["depth"])
    for level, entry in found["levels"].items():
        kind, n = ("head", 2) if level == "inter" else ("neuron", 6)
        site = Site.parse(entry["site"])
        assert (site.kind, site.layer, list(site.indices)) == (kind, 1, sorted(entry["indices"]))
        assert len(entry["again"]) == n and all(0 <= a <= 1 for a in entry["again"])
        assert 0 < entry["jaccard"] <= 1 and entry["by_chance"] == pytest.approx(n / (4 if n == 2 else 48), abs=1e-4)
        assert f"{n} {kind}s" in said and level in said
        control = Site.parse(found["random"][level])
        assert len(control.indices) == n and not set(control.indices) & set(entry["indices"])
        e = found["experts"]["levels"][level]
        assert found["joint"][level]["heads"] == e["measures"]["z"]["heads"]["value"]
        assert found["joint"][level]["size"] == 8
        assert e["separation"]["head"] == found["experts"]["depth"][level]["separation"]["head"][1]
    assert found["experts"]["blocks"] == [0, 1, 2] and found["experts"]["draws"] == 30
    assert "Observation 1 is" in " ".join(said.split()) and "AUROC" in said
    report = (tmp_path / "n" / "experts.md").read_text()
    assert all(f"## {level} by depth" in report for level in LEVELS) and "| inter | " in report and "effect" in report
    for name in ("experts.png", "selected.png", "spectrum.png"):
        assert (tmp_path / "n" / name).read_bytes()[:4] == b"\x89PNG"
    assert done["experts"] == found["experts"]


@pytest.mark.slow
def test_scanned_blocks_do_not_change_what_is_chosen(root, tmp_path):
    one = locate(settings(root, tmp_path / "a", mode="depass", layer=0, max_traces=3))
    two = locate(settings(root, tmp_path / "b", mode="depass", layer=0, max_traces=3, blocks=[2, 1, 2]))
    assert one["levels"] == two["levels"] and one["joint"] == two["joint"]
    assert two["experts"].pop("blocks") == [1, 2] and two["experts"].pop("depth").keys() == set(LEVELS)
    assert one["experts"].pop("blocks") == [] and one["experts"] == two["experts"]


def test_selections_without_a_scan_or_a_contrast(root, tmp_path):
    done = locate(settings(root, tmp_path / "a", selection="quantile", quantile=0.7, contrast=False))
    for entry in done["experts"]["levels"].values():
        assert list(entry["measures"]) == ["raw", "z"] and entry["separation"] == {}
    assert all(e["n_clean"] == 0 for e in done["levels"].values()) and not done["warnings"]
    strict = locate(settings(root, tmp_path / "b", contrast=False))
    assert done["levels"]["intra"]["implied_k"] < strict["levels"]["intra"]["implied_k"]
    literal = locate(settings(root, tmp_path / "c", selection="fixed_k", k_neurons=44, k_heads=4))
    assert 0 < len(literal["levels"]["intra"]["indices"]) <= 6


def test_an_empty_intersection_says_which_k_would_do(root, tmp_path):
    with pytest.raises(
        UserError, match=r"intra: no neuron of block 1 is among the first 1 at .* K = \d+ would hold 6 in"
    ):
        locate(settings(root, tmp_path / "a", selection="fixed_k", k_neurons=1, k_heads=2))
    for key, size in (("k_neurons", 48), ("k_heads", 4)):
        more = {"k_neurons": 40, "k_heads": 4} | {key: size + 1}
        with pytest.raises(UserError, match=f"key '{key}' is {size + 1}, but a block has {size}"):
            locate(settings(root, tmp_path / key, selection="fixed_k", **more))


def test_blocks_out_of_range_are_named(root, tmp_path):
    with pytest.raises(UserError, match="key 'blocks' names block 3, but this model has blocks 0 to 2"):
        locate(settings(root, tmp_path / "a", blocks=[1, 3]))
    with pytest.raises(UserError, match="layers 0 to 2"):
        locate(settings(root, tmp_path / "b", layer=3))
    line = ["--model", "m", "--traces", "t", "--out", "o", "--blocks"]
    assert parse(LocateConfig, [*line, "all"], "probes locate").blocks == ["all"]
    assert parse(LocateConfig, [*line, "0,2", "5"], "probes locate").blocks == [0, 2, 5]
    with pytest.raises(UserError, match="--blocks"):
        parse(LocateConfig, [*line, "every"], "probes locate")


def test_scores_that_are_not_finite_are_refused(root, tmp_path, monkeypatch):
    for bad in (float("nan"), float("inf")):

        def scores(model, ids, targets, layers, bad=bad):
            return {b: (torch.full((len(targets), 48), bad), torch.zeros(len(targets), 4)) for b in layers}

        monkeypatch.setitem(module.SCORES, "direct", scores)
        with pytest.raises(UserError, match=r"trace 'p\d+#1': scores of block 1 are not finite; check the weights of"):
            locate(settings(root, tmp_path / str(bad)))


def test_thin_evidence_is_warned_about(root, tiny_tokenizer, tmp_path, capsys):
    traces = judged_traces(tiny_tokenizer)
    for t in traces:
        t.labels.intra = IntraLabel(True, step=0) if t.labels.intra.has_error else IntraLabel(True)  # none is clean
        t.labels.correct = False
        t.labels.inter = InterLabel()
    write_rows(tmp_path / "traces.jsonl", traces)
    more = {"traces": str(tmp_path / "traces.jsonl")}
    done = locate(settings(root, tmp_path / "a", max_traces=2, **more))
    said = capsys.readouterr().out
    assert set(done["levels"]) == {"intra"} and len(done["warnings"]) == 4
    for part in (
        "inter: no failing trace among the training problems; no neurons",
        "instance: no failing trace of an easy problem with 2 closed steps among",
        "intra: failing spans of 2 problem(s) only",
        "intra: no clean span to hold against the failing ones",
    ):
        assert sum(part in w for w in done["warnings"]) == 1
        assert "warning: " + part in said
    assert done["experts"]["levels"]["intra"]["verdict"] == "undecided"
    for t in traces:
        t.labels.intra = IntraLabel()
    write_rows(tmp_path / "none.jsonl", traces)
    with pytest.raises(UserError, match="no neurons could be located: intra: no failing"):
        locate(settings(root, tmp_path / "b", traces=str(tmp_path / "none.jsonl")))
