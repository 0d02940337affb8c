"""What needs the world outside: `pytest -m network`. The test of the endpoint wants OPENAI_API_KEY (under a cent)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neureasoner.data_builders.config import JudgeConfig, ProblemsConfig, RolloutsConfig
from neureasoner.data_builders.judging import judge_traces
from neureasoner.data_builders.problem_file import build_problems
from neureasoner.data_builders.rollouts import sample_rollouts
from neureasoner.data_builders.sources.config import ImportConfig
from neureasoner.data_builders.sources.importer import import_corpus
from neureasoner.traces import read_traces

pytestmark = [pytest.mark.network, pytest.mark.timeout(600)]


@pytest.mark.skipif("OPENAI_API_KEY" not in os.environ, reason="no key")
def test_a_hosted_model_judges_three_traces(tmp_path: Path) -> None:
    build_problems(ProblemsConfig(out=str(tmp_path), n=3, split="validation", seed=3))
    sample_rollouts(RolloutsConfig(model="tiny", problems=str(tmp_path / "problems.jsonl"), out=str(tmp_path / "r")))
    endpoint = {"model": "gpt-5-nano", "effort": "low", "max_cost": 0.05}
    traces = str(tmp_path / "r" / "traces.jsonl")
    done = judge_traces(JudgeConfig(traces=traces, out=str(tmp_path / "j"), judge="llm", endpoint=endpoint))
    assert done["bill"]["calls"] >= 6 and 0 < done["bill"]["cost"] < 0.05
    key = os.environ["OPENAI_API_KEY"].encode()
    assert all(key not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert all(t.labels is not None for t in read_traces(tmp_path / "j" / "traces.jsonl"))


def test_a_hub_data_set_is_streamed(tmp_path: Path) -> None:
    done = import_corpus(ImportConfig(input="bespokelabs/Bespoke-Stratos-17k", out=str(tmp_path), limit=20))
    assert done["read"] == 20 and done["kept"] > 0
