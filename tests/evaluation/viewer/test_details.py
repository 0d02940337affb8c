"""What is recorded for the page: columns, spectra and scores, against loops and against the controller's own log."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.artifacts import read_json, read_tensors, write_json, write_text
from neureasoner.errors import UserError
from neureasoner.evaluation.evaluate import evaluate
from neureasoner.evaluation.viewer.config import DetailsConfig
from neureasoner.evaluation.viewer.details import FREQUENCIES, Details, columns, details, step_spectrum, write_details
from neureasoner.models import load
from neureasoner.traces import Trace, read_traces

SITES = {"intra": "neuron:1[5,0,3]", "inter": "neuron:0[2] neuron:1[7]"}


@pytest.fixture(scope="module")
def evaluated(checkpoint: Path, tmp_path_factory: Any) -> Path:
    """Three arms: one watched, two not."""
    from neureasoner.evaluation.config import EvaluateConfig

    folder = tmp_path_factory.mktemp("details")
    write_json(folder / "neurons.json", {"layer": 1, "levels": {k: {"site": v} for k, v in SITES.items()}})
    evaluate(
        EvaluateConfig(
            str(checkpoint / "model"),
            str(checkpoint / "data" / "problems.jsonl"),
            str(folder / "out"),
            arms=["vanilla", "sft_only", "full"],
            max_new_tokens=64,
            temperature=1.0,
            limit=6,
            batch_size=8,
            resamples=50,
            device="cpu",
            neurons=str(folder / "neurons.json"),
            show_examples=0,
        )
    )
    write_details(DetailsConfig(str(folder / "out"), device="cpu"))
    return folder / "out"


@pytest.mark.parametrize(("tokens", "most", "per"), [(10, 192, 1), (192, 192, 1), (193, 192, 2), (7, 3, 3), (1, 4, 1)])
def test_columns_are_means_of_magnitudes(tokens: int, most: int, per: int) -> None:
    x = np.random.default_rng(tokens).normal(size=(tokens, 3))
    found, size = columns(x, most)
    assert size == per and len(found) == math.ceil(tokens / per) <= most
    for i in range(len(found)):
        rows = range(i * per, min(tokens, (i + 1) * per))
        for c in range(3):
            assert found[i, c] == pytest.approx(sum(abs(x[t, c]) for t in rows) / len(rows), rel=1e-6)


@pytest.mark.parametrize("tokens", [4, 9, 60])
def test_step_spectrum_equals_loops(tokens: int) -> None:
    x = np.random.default_rng(tokens).normal(size=(tokens, 3))
    x[:, 1] = -2.0  # does not vary, and so has no say
    wanted = np.zeros(len(FREQUENCIES))
    for c in (0, 2):
        y = [abs(v) for v in x[:, c]]
        mean = sum(y) / tokens
        power = []
        for f in FREQUENCIES:
            re = sum((v - mean) * math.cos(2 * math.pi * f * t) for t, v in enumerate(y))
            im = sum((v - mean) * math.sin(2 * math.pi * f * t) for t, v in enumerate(y))
            power.append(re * re + im * im)
        wanted += np.array(power) / sum(power) / 2
    np.testing.assert_allclose(step_spectrum(x), wanted, rtol=1e-9, atol=1e-15)
    assert step_spectrum(x).sum() == pytest.approx(1)


def test_spectrum_of_known_series() -> None:
    t = np.arange(96)[:, None]
    for k in (3, 11, 20):
        assert int(step_spectrum(2 + np.cos(2 * np.pi * FREQUENCIES[k] * t)).argmax()) == k
    assert not step_spectrum(np.full((50, 2), 3.0)).any() and not step_spectrum(np.ones((3, 2))).any()
    assert not step_spectrum(np.zeros((0, 2))).any()


def response_values(model: Any, trace: Trace) -> dict[str, np.ndarray]:
    """Independent recording: one plain forward, hooks written here. ``|input of down_proj|`` of the response."""
    kept: dict[int, torch.Tensor] = {}
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(lambda m, args, i=i: kept.__setitem__(i, args[0][0].detach()))
        for i, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([[*trace.prompt_ids, *trace.response_ids]]))
    for hook in hooks:
        hook.remove()
    at = len(trace.prompt_ids)
    one, zero = kept[1][at:].abs().double().numpy(), kept[0][at:].abs().double().numpy()
    return {"intra": one[:, [5, 0, 3]], "inter": np.stack([zero[:, 2], one[:, 7]], axis=1)}


def test_the_file_holds_what_the_models_did(evaluated: Path, checkpoint: Path) -> None:
    tensors, meta = read_tensors(evaluated / "details.safetensors")
    assert meta["sites"] == SITES and len(meta["traces"]) == 18
    models = {"vanilla": load(str(checkpoint / "base"))[0], "full": load(str(checkpoint / "model"))[0]}
    for arm, model in models.items():
        for trace in read_traces(evaluated / "traces" / f"{arm}.jsonl"):
            entry = meta["traces"][f"{arm}/{trace.id}"]
            for level, values in response_values(model, trace).items():
                scale = tensors[f"{level}.scale"].double().numpy()
                heat = tensors[f"{level}.heat"][slice(*entry["columns"])].numpy()
                assert entry["per"] == 1 and heat.shape == values.shape
                np.testing.assert_allclose(heat, 255 * np.minimum(values / scale, 1), atol=0.51)
                spectra = tensors[f"{level}.spectrum"][slice(*entry["steps"])].float().numpy()
                assert len(spectra) == len(trace.steps)
                for step, row in zip(trace.steps, spectra, strict=True):
                    np.testing.assert_allclose(row, step_spectrum(values[step.token_start : step.token_end]), atol=1e-3)


def test_scores_are_those_the_controller_would_have_logged(evaluated: Path) -> None:
    """An arm that watched logged scores; the same traces, read as if nobody had watched, must give the same ones."""
    from neureasoner.evaluation.viewer.details import probe_scores
    from neureasoner.inference.steered import SteeredModel

    steered = SteeredModel.from_pretrained(read_json(evaluated / "results.json")["model"], device="cpu")
    compared = 0
    for trace in read_traces(evaluated / "traces" / "full.jsonl"):
        first = min((e["token"] for e in trace.events), default=10**9)
        for rule in steered.plan.rules:
            logged = [[s["rule"], s["step"], s["token"]] for s in trace.meta["scores"] if s["rule"] == rule.name]
            values = [s["score"] for s in trace.meta["scores"] if s["rule"] == rule.name]
            n = sum(token <= first for *_, token in logged)
            found = probe_scores(steered.probes[rule.trigger.probe], {}, trace)[:n]
            assert [row[:3] for row in found] == logged[:n]
            assert [row[3] for row in found] == pytest.approx(values[:n], abs=1e-4)
            compared += n
    assert compared > 10
    meta = read_tensors(evaluated / "details.safetensors")[1]["traces"]
    assert any(entry["scores"] for key, entry in meta.items() if key.startswith("sft_only/"))
    assert not any(entry["scores"] for key, entry in meta.items() if key.startswith("full/")), "it logged its own"


def test_a_threshold_of_the_plan_goes_before_the_probe_s() -> None:
    from types import SimpleNamespace as Of

    from neureasoner.evaluation.viewer.details import limits_of

    probes = {level: Of(features=Of(level=level), threshold=0.25) for level in ("intra", "inter")}
    triggers = [Of(probe="intra", threshold=None), Of(probe="inter", threshold=0.0)]
    assert limits_of(triggers, probes) == {"intra": 0.25, "inter": 0.0}


def test_a_trace_comes_back_as_the_page_reads_it(evaluated: Path) -> None:
    found = Details.beside(evaluated)
    assert found is not None and found.levels["inter"] == {"site": SITES["inter"], "channels": 2}
    trace = read_traces(evaluated / "traces" / "full.jsonl")[0]
    seen = found.of("full", trace)
    assert seen is not None
    start, stop = found.meta["traces"][f"full/{trace.id}"]["columns"]
    heat = np.frombuffer(base64.b64decode(seen["levels"]["intra"]["heat"]), np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(heat, found.tensors["intra.heat"][start:stop])
    assert found.of("other", trace) is None
    trace.response_ids[0] += 1
    with pytest.raises(UserError, match="recorded from another trace"):
        found.of("full", trace)
    assert Details.beside(evaluated / "traces") is None


def test_command_writes_the_page_with_them(evaluated: Path, capsys: Any) -> None:
    details(DetailsConfig(str(evaluated), traces=6, device="cpu"))
    assert "details.safetensors (" in capsys.readouterr().out
    html = (evaluated / "report.html").read_text(encoding="utf-8")
    assert '"levels":{"intra":{"site":"neuron:1[5,0,3]","channels":3}' in html and "6 of 18 traces" in html


def test_bad_input(evaluated: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no results\.json; name the folder"):
        write_details(DetailsConfig(str(tmp_path)))
    (tmp_path / "traces").symlink_to(evaluated / "traces")
    results = read_json(evaluated / "results.json")
    write_json(tmp_path / "results.json", results | {"neurons": {}})
    with pytest.raises(UserError, match="names no neurons"):
        write_details(DetailsConfig(str(tmp_path), device="cpu"))
    write_json(tmp_path / "results.json", results | {"model": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="gone"):
        write_details(DetailsConfig(str(tmp_path), device="cpu"))
    write_text(tmp_path / "details.safetensors", "no tensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        Details.beside(tmp_path)
    for wrong in ({"traces": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match="at least 1"):
            DetailsConfig("run", **wrong)
    with pytest.raises(UserError, match="'run' is empty"):
        DetailsConfig("")
