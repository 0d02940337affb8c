"""A real model behind the API: what comes back is what it says, and a judge that cannot judge is never believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neureasoner.data_builders.config import JudgeConfig, ProblemsConfig, RolloutsConfig
from neureasoner.data_builders.endpoint.asker import ask_all
from neureasoner.data_builders.endpoint.requests import Message, Question, Request
from neureasoner.data_builders.judging import judge_traces
from neureasoner.data_builders.problem_file import build_problems
from neureasoner.data_builders.rollouts import sample_rollouts
from neureasoner.errors import UserError
from neureasoner.model_files import resolve
from neureasoner.models import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_answers_are_the_models_own(serve: Any, make_config: Any) -> None:
    server = serve("--model", resolve("tiny"))
    config = make_config(server, max_tokens=200)
    asked = ["Calculate 12 + 4 * 9.", "Calculate 16 - 3 * 4."]
    questions = [
        Question(q, Request("tiny", (Message("user", q),), None, "", config.params()), lambda text: text) for q in asked
    ]
    answers = {o.id: o.value for o in ask_all(questions, config)}
    model, tokenizer = load("tiny", dtype="bfloat16")  # as plain transformers loads it
    for q in asked:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=200, do_sample=False)
        assert answers[q] == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "\\boxed{48}" in answers[asked[0]]


def test_a_model_that_cannot_judge_labels_nothing(serve: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-canary-0123456789abcdef")
    build_problems(ProblemsConfig(out=str(tmp_path), n=4, split="validation", seed=3))
    sample_rollouts(RolloutsConfig(model="tiny", problems=str(tmp_path / "problems.jsonl"), out=str(tmp_path / "r")))
    server = serve("--model", resolve("tiny"))
    endpoint = {"model": "tiny", "base_url": server.url, "key_env": "TEST_KEY", "max_tokens": 100, "retries": 1}
    config = JudgeConfig(
        traces=str(tmp_path / "r" / "traces.jsonl"), out=str(tmp_path / "j"), judge="llm", endpoint=endpoint
    )
    with pytest.raises(UserError, match="no trace could be labelled"):
        judge_traces(config)
    assert len(server.rows("answered")) == 4 * 2 * 2, "two questions a trace, each asked again once"
    assert not (tmp_path / "j" / "traces.jsonl").exists()
