"""A steered checkpoint of a random model that writes paragraphs, with real (if silly) probes; and its problem file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.artifacts import write_json, write_text
from neureasoner.data_builders.problem_file import make_problems
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.inference.plan import Plan
from neureasoner.models import fingerprint
from neureasoner.probes.detectors.probe import Probe
from neureasoner.probes.features import FeatureSet
from neureasoner.steps import Separators
from neureasoner.traces import Problem, write_rows

PLAN = """
name: test
rules:
  - name: instance
    trigger: {probe: probes/instance, at_step: 3, max: 1}
    action: {force: "Okay, I have finished thinking.\\n</think>\\n\\n"}
  - name: inter
    trigger: {probe: probes/inter, cooldown: 1, max: 1}
    action: {force: "<INTER>"}
  - name: intra
    trigger: {probe: probes/intra, cooldown: 1, max: 2}
    action: {force: "<INTRA>"}
"""


def biased(model: Any, tokenizer: Any) -> Any:
    """Give a stock model an output bias: channel 0 is the same for every token, and only the head reads it."""
    separators = Separators.of(tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        for block in model.model.layers:
            block.self_attn.o_proj.weight[0] = 0.0
            block.mlp.down_proj.weight[0] = 0.0
        head = model.lm_head.weight
        head[:, 0] = 0.0
        for i in range(separators.size):
            if separators.contains_separator(i):
                head[i, 0] = 2.0
        head[tokenizer.eos_token_id, 0] = 0.6
        head[tokenizer.convert_tokens_to_ids(["<INTRA>", "<INTER>"]), 0] = -20.0
        head[len(tokenizer) :, 0] = -20.0
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: Any, make_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """``model/`` (steered) and ``base/`` in one folder; problems.jsonl beside them, as ``data problems`` leaves it."""
    root = tmp_path_factory.mktemp("evaluation")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<INTRA>", "<INTER>"]})
    for name, seed in (("base", 1), ("model", 2)):
        model = biased(make_model(seed=seed), tokenizer)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rng = np.random.default_rng(0)
    for level, window in (("intra", 2), ("inter", 2), ("instance", 3)):
        for folder in (level, f"paper/{level}"):
            probe = Probe(
                FeatureSet.named("length", level, window),
                model_fingerprint=fingerprint(model),
                hidden=4,
                epochs=1,
            ).fit(rng.normal(size=(40, 6)), np.arange(40) % 2)
            probe.threshold = 0.5
            probe.save(root / "model" / "probes" / folder)
    write_text(root / "model" / "plan.yaml", PLAN)
    Plan.load(root / "model")
    write_json(root / "model" / "neureasoner.json", {"base": str(root / "base")})
    problems = make_problems(["arithmetic", "countdown", "words"], 6, "test", 0)
    write_rows(root / "data" / "problems.jsonl", problems)
    write_json(root / "data" / "stage.json", {"config": {"split": "test"}})
    return root


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path) -> Callable[..., EvaluateConfig]:
    """``settings(**changes)``: a configuration that takes about a second an arm."""

    def make(**changes: Any) -> EvaluateConfig:
        fixed = {
            "model": str(checkpoint / "model"),
            "problems": str(checkpoint / "data" / "problems.jsonl"),
            "out": str(tmp_path / "out"),
            "max_new_tokens": 48,
            "temperature": 1.0,
            "batch_size": 4,
            "resamples": 200,
            "device": "cpu",
        }
        return EvaluateConfig(**(fixed | changes))

    return make


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """Two files of one problem each that wants a program, and the level at which the sandbox holds those here."""
    from neureasoner.errors import UserError
    from neureasoner.evaluation.benchmarks.code import sandbox
    from neureasoner.evaluation.benchmarks.suites import Suite, keep

    monkeypatch.setenv("NEUREASONER_CACHE", str(tmp_path / "cache"))
    try:
        level = sandbox().containment.level
    except UserError as e:
        pytest.skip(str(e))
    answer = keep(Suite((("41", "42"),), "", 0.0))
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [Problem(name, "livecodebench", 1, f"Add {name}.", answer)])
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), level
