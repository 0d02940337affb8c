"""``probes directions`` end to end on a model in which one word writes the direction, and its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner import cli
from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.models import fingerprint, load
from neureasoner.probes.directions.config import DirectionsConfig
from neureasoner.probes.directions.directions import directions
from neureasoner.probes.labels import split_problems
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace, read_traces, write_rows

RIGHT, WRONG = " apples", " check"


def make_traces(tokenizer: Any, n: int = 20, signal: bool = True) -> list[Trace]:
    """Two right and two wrong traces a problem; right ones say one word, wrong ones another."""
    rng, out = np.random.default_rng(0), []
    for p in range(n):
        for s in range(4):
            right = s < 2
            word = (RIGHT if right else WRONG) if signal else ""
            text = f"Try {rng.integers(10, 99)}{word}.\n\n" * (1 + s) + "Done." + tokenizer.eos_token
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            prompt = tokenizer(f"<think>\nQuestion {p}", add_special_tokens=False)["input_ids"]
            labels = Labels(right, "1", IntraLabel(), InterLabel())
            problem = Problem(f"p{p:02d}", "f", 1, f"Question {p}", "a")
            out.append(Trace(f"p{p}#{s}", problem, prompt, ids, text, [], True, labels))
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any, make_model: Any, tiny_tokenizer: Any) -> Path:
    """A model folder whose embedding of the right word is far along axis 3; traces beside it."""
    folder: Path = tmp_path_factory.mktemp("directions")
    model = make_model()
    words = [tiny_tokenizer(w, add_special_tokens=False)["input_ids"][-1] for w in (RIGHT, WRONG)]
    with torch.no_grad():
        for word, sign in zip(words, (1, -1), strict=True):
            model.model.embed_tokens.weight[word, 3] = 40.0 * sign
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "traces.jsonl", make_traces(tiny_tokenizer))
    return folder


def stage(root: Path, name: str, **more: Any) -> DirectionsConfig:
    base = {"model": str(root / "model"), "traces": str(root / "traces.jsonl"), "out": str(root / name)}
    return DirectionsConfig(**(base | more))


def test_planted_direction_is_found_with_its_meaning(root: Path) -> None:
    summary = directions(stage(root, "correct"))
    found = Direction.load(root / "correct")
    model, _ = load(str(root / "model"))
    found.check(model)
    assert found.sites == ["residual:0", "residual:1"] and found.fingerprint == fingerprint(model)
    value = found.values["residual:0"]
    assert int(value.abs().argmax()) == 3 and float(value[3]) > 0  # towards the word of right traces
    assert found.meaning == "positive = towards right traces, away from wrong ones"
    assert summary["validation_auroc"]["residual:0"] == 1.0 and not summary["warnings"]
    split = split_problems(read_traces(root / "traces.jsonl"), 0.2, 0.2, 0)
    assert summary["problems"] == {part: sum(s == part for s in split.values()) for part in ("train", "validation")}
    info = found.info
    assert info["sizes"] == {"neuron": 48, "head": 4} and info["estimator"] == "paired mean difference"
    assert info["natural"]["residual:0"]["norm"] > 0 and info["options"]["contrast"] == "correct"
    found.random_like(0).check(model)


def test_values_equal_a_difference_of_plain_forward_passes(root: Path) -> None:
    directions(stage(root, "check"))
    model, _ = load(str(root / "model"))
    traces = read_traces(root / "traces.jsonl")
    split = split_problems(traces, 0.2, 0.2, 0)
    per_problem: dict[str, dict[bool, list[torch.Tensor]]] = {}
    for t in (t for t in traces if split[t.problem.id] == "train"):
        with torch.no_grad():
            ids = torch.tensor([t.prompt_ids + t.response_ids])
            hidden = model(ids, output_hidden_states=True).hidden_states[1][0].double()
        state = hidden[len(t.prompt_ids) : -1].mean(dim=0)
        assert t.labels is not None
        per_problem.setdefault(t.problem.id, {True: [], False: []})[t.labels.correct].append(state)
    rows = [torch.stack(v[True]).mean(dim=0) - torch.stack(v[False]).mean(dim=0) for v in per_problem.values()]
    expected = torch.stack(rows).mean(dim=0).float()
    torch.testing.assert_close(Direction.load(root / "check").values["residual:0"], expected, rtol=1e-4, atol=1e-4)


def test_estimators_and_sites_by_command(root: Path, capsys: Any) -> None:
    names = ["--model", str(root / "model"), "--traces", str(root / "traces.jsonl")]
    where = ["--sites", "head:1", "neuron:0[5,1]", "--estimator", "pca", "--length", "unit"]
    assert cli.main(["probes", "directions", *names, *where, "--out", str(root / "pca")]) == 0
    assert "PCA of differences" in capsys.readouterr().out
    found = Direction.load(root / "pca")
    assert found.sites == ["head:1[0,1,2,3]", "neuron:0[5,1]"]
    assert found.values["head:1[0,1,2,3]"].shape == (4, 12)
    assert list(found.norms().values()) == pytest.approx([1, 1])
    assert len(found.info["std"]["neuron:0[5,1]"]) == 2
    relative = ["--sites", "neuron:*", "--estimator", "relative", "--top-k", "5"]
    assert cli.main(["probes", "directions", *names, *relative, "--out", str(root / "relative")]) == 0
    found = Direction.load(root / "relative")
    assert sum(len(v) for v in found.values.values()) == 5
    assert all(len(found.info["std"][s]) == len(v) for s, v in found.values.items())
    thoughts = ["--contrast", "thoughts", "--sites", "residual:1"]
    assert cli.main(["probes", "directions", *names, *thoughts, "--out", str(root / "thoughts")]) == 2
    assert "0 negative states" in capsys.readouterr().err
    thoughts += ["--reflection", "^Done", "--transition", "nothing of the kind"]
    assert cli.main(["probes", "directions", *names, *thoughts, "--out", str(root / "own")]) == 0
    assert "execute" in Direction.load(root / "own").meaning
    assert Direction.load(root / "own").info["estimator"] == "mean difference"


def test_removed_direction_is_gone(root: Path) -> None:
    directions(stage(root, "first", sites=["residual:0"]))
    directions(stage(root, "rest", sites=["residual:0"], contrast="short", remove=[str(root / "first")]))
    first, rest = (Direction.load(root / n).values["residual:0"] for n in ("first", "rest"))
    assert abs(float(first @ rest)) < 1e-4 * float(first.norm() * rest.norm())
    with pytest.raises(UserError, match="none of its sites"):
        directions(stage(root, "none", sites=["residual:1"], remove=[str(root / "first")]))


def test_stage_is_done_once(root: Path) -> None:
    directions(stage(root, "once", problems=8))
    stamp = (root / "once" / "direction.json").stat().st_mtime_ns
    assert directions(stage(root, "once", problems=8))["problems"]["train"] == 8
    assert (root / "once" / "direction.json").stat().st_mtime_ns == stamp


def test_labels_without_meaning_are_called_so(root: Path, tiny_tokenizer: Any, tmp_path: Path, capsys: Any) -> None:
    traces = make_traces(tiny_tokenizer, signal=False)
    for i, t in enumerate(traces):
        t.response_ids = traces[4 * (i // 4)].response_ids  # all four alike
        t.response = traces[4 * (i // 4)].response
        assert t.labels is not None
        t.labels.correct = bool(np.random.default_rng(i).integers(2))
    write_rows(tmp_path / "traces.jsonl", traces)
    summary = directions(stage(root, "x", traces=str(tmp_path / "traces.jsonl"), out=str(tmp_path / "o"), paired=False))
    assert summary["warnings"] and "no site tells the sides apart" in capsys.readouterr().out


def test_too_little_data_is_told_before_a_model_is_loaded(
    root: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neureasoner.models.load", lambda *_, **__: pytest.fail("the model was loaded"))
    traces = make_traces(tiny_tokenizer)
    for t in traces:
        assert t.labels is not None
        t.labels.correct = True
    write_rows(tmp_path / "a.jsonl", traces)
    given = {"traces": str(tmp_path / "a.jsonl")}
    for more, message in (
        ({}, "0 problems with both sides"),
        ({"estimator": "pca"}, "0 problems with both sides"),
        ({"paired": False}, "0 negative states"),
        ({"estimator": "relative", "sites": ["neuron:*"]}, "0 negative states"),
        ({"contrast": "thoughts", "reflection": ["never"], "transition": ["never"]}, "0 negative states"),
    ):
        with pytest.raises(UserError, match=f"{message}, 8 are needed"):
            directions(stage(root, "early", **given, **more))


def test_too_little_data_and_no_labels(root: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    traces = make_traces(tiny_tokenizer)
    for t in traces:
        assert t.labels is not None
        t.labels.correct = True
    write_rows(tmp_path / "a.jsonl", traces)
    with pytest.raises(UserError, match="0 problems with both sides, 8 are needed"):
        directions(stage(root, "a", traces=str(tmp_path / "a.jsonl")))
    for t in traces:
        t.finished = False
    write_rows(tmp_path / "b.jsonl", traces)
    with pytest.raises(UserError, match="0 training problems have states of the contrast 'short'"):
        directions(stage(root, "b", traces=str(tmp_path / "b.jsonl"), contrast="short"))
    for t in traces:
        t.labels = None
    write_rows(tmp_path / "c.jsonl", traces)
    with pytest.raises(UserError, match="run data judge"):
        directions(stage(root, "c", traces=str(tmp_path / "c.jsonl")))
    own = {"contrast": "thoughts", "reflection": ["^Done"]}  # labelled by keywords, not by a judge
    assert directions(stage(root, "d", traces=str(tmp_path / "c.jsonl"), **own))["examples"]["negative"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"contrast": "x"}, "'contrast' must be one of correct, short, thoughts"),
        ({"estimator": "x"}, "'estimator' must be one of mean, pca, relative"),
        ({"length": "x"}, "'length' must be one of natural, unit"),
        ({"pool": "x"}, "'pool' must be one of mean, last, boundary"),
        ({"pool": "boundary"}, "belongs to the contrast 'thoughts'"),
        ({"contrast": "thoughts", "pool": "mean"}, "belongs to the contrast 'thoughts'"),
        ({"sites": []}, "'sites' is empty"),
        ({"top_k": 0}, "'top_k' must be at least 1"),
        ({"batch_size": 0}, "'batch_size' must be at least 1"),
        ({"problems": -1}, "'problems' must be at least 0"),
        ({"least_problems": 1}, "'least_problems' must be at least 2"),
        ({"estimator": "pca", "paired": False}, "'paired' must be true"),
        ({"estimator": "relative", "length": "unit"}, "belong to the estimators"),
        ({"estimator": "relative", "paired": True}, "belong to the estimators"),
        ({"contrast": "thoughts", "reflection": [], "transition": []}, "every thought would be execution"),
        ({"template": False}, "only with retokenise"),
        ({"validation": 0.6, "test": 0.5}, "below 1 in sum"),
    ],
)
def test_bad_settings_are_named(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DirectionsConfig(**({"model": "m", "traces": "t", "out": "o"} | more))
