"""``training bias``: the gradient against the formulas of core.md §4.2, arms, resume, choice of the rate, bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from neureasoner.data_builders.problem_file import make_problems
from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.models import load
from neureasoner.sampler import Drawn
from neureasoner.traces import Problem, write_rows
from neureasoner.training import bias, policy_trainer
from neureasoner.training.bias_config import BiasConfig
from neureasoner.training.policy_trainer import split
from neureasoner.training.vectors import BiasVectors, stacked


@pytest.fixture
def problem_file(tmp_path: Path) -> Path:
    write_rows(tmp_path / "problems.jsonl", make_problems(["arithmetic"], 8, "train", 1))
    return tmp_path / "problems.jsonl"


@pytest.fixture
def config(model_folder: Path, problem_file: Path, tmp_path: Path) -> Callable[..., BiasConfig]:
    def make(**changes: Any) -> BiasConfig:
        settings: dict[str, Any] = {"steps": 3, "trial_steps": 1, "prompts": 2, "samples": 4, "micro_batch": 4}
        settings |= {"max_new_tokens": 6, "learning_rate": [1e-2], "save_steps": 1, "reward": "random", "warmup": 0.0}
        settings |= {"model": str(model_folder), "problems": str(problem_file), "out": str(tmp_path / "out")}
        return BiasConfig(**(settings | changes))

    return make


# ---- The gradient


class Stop(Exception):
    """Raised by a callback that has seen enough."""


RESPONSES = [[7, 3, 9], [4], [8, 8, 2, 6, 5], [3, 1], [9, 9, 1], [2, 5], [6], [7, 1, 4, 4]]
REWARDS = [1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0]  # the second group teaches nothing


def gradient_of(
    settings: BiasConfig, monkeypatch: pytest.MonkeyPatch, rewards: list[float], folder: Path
) -> tuple[Any, list[list[int]], dict[str, torch.Tensor]]:
    """(the trainer, its prompts, the gradient by parameter) of the first update on ``RESPONSES``."""
    prompts: list[list[int]] = []
    given = iter(rewards)

    def fixed(model: Any, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        prompts.extend(prompt_ids)
        logprobs = []
        for prompt, ids in zip(prompt_ids, RESPONSES, strict=True):
            with torch.no_grad():
                row = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logprobs.append(row.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist())
        rows = [Drawn(ids, False, values) for ids, values in zip(RESPONSES, logprobs, strict=True)]
        return SimpleNamespace(rows=rows)

    monkeypatch.setattr(policy_trainer, "sample", fixed)
    found: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            raise Stop

    trainer = bias.build(settings, 1e-2, 1, folder, reward=lambda *_: next(given))
    trainer.add_callback(Look())
    with pytest.raises(Stop):
        trainer.train()
    return trainer, prompts, found


def objective(model: Any, prompts: list[list[int]], advantages: list[float], weights: list[float]) -> torch.Tensor:
    """Oracle, by explicit loops: ``-Σ_i w_i A_i Σ_t log π(y_it)``, each response in a pass of its own."""
    total = torch.zeros(())
    for prompt, ids, advantage, weight in zip(prompts, RESPONSES, advantages, weights, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0]
        for t, token in enumerate(ids):
            total = total - weight * advantage * logits[len(prompt) - 1 + t].log_softmax(-1)[token]
    return total


def assert_gradient(settings: BiasConfig, prompts: Any, found: Any, advantages: Any, weights: Any) -> None:
    model, _ = load(settings.model, device="cpu")
    if settings.arm == "vectors":
        BiasVectors(model).freeze_rest()
    objective(model, prompts, advantages, weights).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=2e-3)
    assert max(float(v.norm()) for v in wanted.values()) > 1e-3


N = sum(map(len, RESPONSES))
LEAVE_ONE_OUT = [4 / 3, -4 / 3, -4 / 3, 4 / 3, 0, 0, 0, 0]  # golden value of core.md §8.2


@pytest.mark.parametrize("arm", ["vectors", "full"])
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_rloo_is_the_papers_loss(
    config: Callable[..., BiasConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arm: str, micro_batch: int
) -> None:
    settings = config(arm=arm, micro_batch=micro_batch, max_grad_norm=1e9)
    _, prompts, found = gradient_of(settings, monkeypatch, REWARDS, tmp_path / "c")
    assert_gradient(settings, prompts, found, LEAVE_ONE_OUT, [1 / N] * 8)


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_grpo_with_dapo_and_no_scale_is_rloo_times_g_minus_1_over_g(
    config: Callable[..., BiasConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, micro_batch: int
) -> None:
    settings = config(objective="grpo", micro_batch=micro_batch, max_grad_norm=1e9)
    _, prompts, found = gradient_of(settings, monkeypatch, REWARDS, tmp_path / "c")
    assert_gradient(settings, prompts, found, [a * 3 / 4 for a in LEAVE_ONE_OUT], [1 / N] * 8)


def test_grpo_with_group_scale_and_grpo_loss_is_deepseekmaths(
    config: Callable[..., BiasConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = config(objective="grpo", scale_rewards="group", loss_type="grpo", max_grad_norm=1e9)
    _, prompts, found = gradient_of(settings, monkeypatch, REWARDS, tmp_path / "c")
    std = torch.tensor(REWARDS[:4]).std().item()
    advantages = [r / (std + 1e-4) for r in REWARDS[:4]] + [0.0] * 4
    assert_gradient(settings, prompts, found, advantages, [1 / (8 * len(ids)) for ids in RESPONSES])


def test_grpo_with_a_kl_term_starts_where_it_does_without(
    config: Callable[..., BiasConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """k3 and its gradient are 0 at the reference, which is the model without its vectors."""
    settings = config(objective="grpo", beta=0.5, max_grad_norm=1e9)
    trainer, prompts, found = gradient_of(settings, monkeypatch, REWARDS, tmp_path / "c")
    assert_gradient(settings, prompts, found, [a * 3 / 4 for a in LEAVE_ONE_OUT], [1 / N] * 8)
    assert not any("bias_vector" in name for name, _ in trainer.ref_model.named_parameters())


def test_split_keeps_what_trains() -> None:
    length = [3, 1, 5, 2]
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in length])
    prompt = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]])
    advantages = torch.tensor([0.0, 1.0, 0.0, -1.0])
    batch = {"prompt_ids": prompt * 7, "prompt_mask": prompt, "completion_ids": mask * 9, "completion_mask": mask}
    batch |= {"sampling_per_token_logps": mask * -1.0, "advantages": advantages, "tokens": torch.tensor(11)}
    kept = split(batch, 2, drop=True)
    assert [p["advantages"].tolist() for p in kept] == [[1.0], [-1.0]], "by length: 3 tokens, then 3"
    assert all(int(p["tokens"]) == 11 for p in kept)
    assert kept[0]["prompt_ids"].tolist() == [[7, 7]] and kept[0]["completion_ids"].tolist() == [[9]]
    assert kept[1]["prompt_ids"].tolist() == [[7]] and kept[1]["sampling_per_token_logps"].shape == (1, 2)
    whole = split(batch, 2, drop=False)
    assert [p["advantages"].tolist() for p in whole] == [[1.0, -1.0], [0.0, 0.0]]
    three = split(batch, 3, drop=True)
    assert [len(p["advantages"]) for p in three] == [1, 1, 1], "a part never runs empty"


# ---- Whole runs


@pytest.mark.parametrize("arm", ["vectors", "lora", "full"])
def test_an_arm_trains_and_is_read_back(config: Callable[..., BiasConfig], arm: str) -> None:
    settings = config(arm=arm)
    summary = bias.train_bias(settings)
    out = Path(settings.out)
    base, _ = load(settings.model, device="cpu")
    ids = torch.tensor([[5, 9, 2, 7]])
    if arm == "vectors":
        direction = Direction.load(out / "direction")
        direction.check(base)
        assert direction.meaning.startswith("positive = ") and direction.sites == ["residual:0", "residual:1"]
        assert summary["trained_parameters"] == 64 and stacked(direction, 2).abs().min() > 0
        assert 64 * 8 <= summary["optimizer_bytes"] <= 64 * 8 + 2 * 8  # two moments, and a step count each
    else:
        trained, tokenizer = load(str(out / "model"), device="cpu")
        assert tokenizer.eos_token and (trained(ids).logits - base(ids).logits).abs().max() > 1e-4
        moved = {
            n for (n, p), q in zip(base.named_parameters(), trained.parameters(), strict=True) if not torch.equal(p, q)
        }
        assert moved == (
            {n for n in moved if "down_proj" in n} if arm == "lora" else set(dict(base.named_parameters()))
        )
    if arm == "lora":
        assert summary["trained_parameters"] == 2 * 4 * (48 + 32) and (out / "adapter").is_dir()
    assert summary["gap"] < 1e-4, "trainer and sampler are one model"
    assert {"stage.json", "log.json", "curve.png"} <= {p.name for p in out.iterdir()}
    assert not (out / "checkpoints").exists()
    assert [h["step"] for h in json.loads((out / "log.json").read_text())] == [1, 2, 3]
    assert bias.train_bias(settings) == summary, "a second call does nothing"


def test_trainer_and_sampler_agree_in_bfloat16(config: Callable[..., BiasConfig]) -> None:
    """core.md §4 wants a mean below 1e-2 there; above 2e-2 a run stops."""
    summary = bias.train_bias(config(dtype="bfloat16", max_new_tokens=24, prompts=4))
    assert 1e-5 < summary["gap"] < 1e-2 < policy_trainer.GAP <= 2e-2


def test_the_vectors_learn_what_is_rewarded(config: Callable[..., BiasConfig], tmp_path: Path) -> None:
    """Responses of a random model that hold an 'e' are rewarded: their share grows."""
    shares: list[float] = []

    def reward(problem: Problem, response: str, finished: bool) -> float:
        shares.append(float("e" in response))
        return 1.0 if "e" in response else -1.0

    settings = config(reward="verified", steps=16, samples=16, micro_batch=32, save_steps=100, learning_rate=[0.1])
    bias.train(settings, 0.1, 16, tmp_path / "c", reward)
    assert len(shares) == 16 * 32
    first, last = sum(shares[:64]) / 64, sum(shares[-64:]) / 64
    assert first < 0.6 and last - first > 0.2


@pytest.mark.parametrize("arm", ["vectors", "lora"])
def test_an_interrupted_run_ends_where_the_other_does(
    config: Callable[..., BiasConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arm: str
) -> None:
    """Interrupted in the middle of the second epoch: four updates, two an epoch."""
    how = {"arm": arm, "prompts": 4, "samples": 2, "steps": 4}
    whole = bias.train_bias(config(**how, out=str(tmp_path / "whole")))
    seen = [0]
    real = policy_trainer.sample

    def dies(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(policy_trainer, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        bias.train_bias(config(**how))
    torch.manual_seed(123)
    resumed = bias.train_bias(config(**how))
    assert seen[0] == 5, "one update was left"
    assert {k: v for k, v in resumed.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    name = {"vectors": "direction/direction.safetensors", "lora": "model/model.safetensors"}[arm]
    a, b = (load_file(tmp_path / run / name) for run in ("whole", "out"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_sft_learns_the_right_traces_only(
    config: Callable[..., BiasConfig], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from neureasoner.prompts import prompt_text
    from neureasoner.responses import read_response

    problem = Problem("s", "arithmetic", 1, "Calculate 3 + 4 * 2.", "11")
    prompt = tiny_tokenizer(prompt_text(tiny_tokenizer, problem.question)).input_ids
    rows = []
    for i, answer in enumerate(["11", "12", "11", "11", "11"]):
        ids = tiny_tokenizer(f"So.\n</think>\n\n\\boxed{{{answer}}}<|im_end|>").input_ids
        response = read_response(tiny_tokenizer, prompt, ids[:-1] if i == 2 else ids, [tiny_tokenizer.eos_token_id])
        rows.append(response.to_trace(f"s#{i}", problem))
    write_rows(tmp_path / "traces.jsonl", rows)
    how = {"objective": "sft", "problems": "", "traces": str(tmp_path / "traces.jsonl"), "samples": 1, "micro_batch": 1}
    settings = config(**how, prompts=3, steps=6, learning_rate=[0.1])
    kept = bias._sft_rows(settings)
    assert len(kept) == 3, "the wrong one and the unfinished one are left out"
    assert kept[0]["labels"] == [-100] * len(prompt) + rows[0].response_ids
    assert kept[0]["input_ids"] == prompt + rows[0].response_ids
    summary = bias.train_bias(settings)
    losses = [h["loss"] for h in json.loads((tmp_path / "out" / "log.json").read_text())]
    assert losses[-1] < 0.9 * losses[0] and summary["loss"]["first"] == summary["loss"]["last"]
    with pytest.raises(UserError, match="3 right, finished traces, fewer than one batch of 4"):
        bias._sft_rows(config(**how, prompts=4))
    write_rows(tmp_path / "held.jsonl", [problem])
    with pytest.raises(UserError, match="problem 's' is a training problem too"):
        bias.train_bias(config(**how, prompts=3, validation=str(tmp_path / "held.jsonl"), out=str(tmp_path / "o2")))
    foreign = [replace(r, response_ids=[i + 1 for i in r.response_ids]) for r in rows]
    write_rows(tmp_path / "traces.jsonl", foreign)
    with pytest.raises(UserError, match="trace 's#0' is in the tokens of another model"):
        bias.train_bias(config(**how, prompts=3, out=str(tmp_path / "o3")))


@pytest.mark.parametrize(("arm", "rate"), [("vectors", 1e-3), ("lora", 1e-4), ("full", 1e-6)])
def test_the_rate_of_an_arm_is_the_papers(config: Callable[..., BiasConfig], arm: str, rate: float) -> None:
    assert config(arm=arm, learning_rate=[]).learning_rate == [rate]


def test_the_rate_is_chosen_on_validation_problems(config: Callable[..., BiasConfig], tmp_path: Path) -> None:
    write_rows(tmp_path / "held.jsonl", make_problems(["arithmetic"], 3, "validation", 2))
    held = str(tmp_path / "held.jsonl")
    settings = config(learning_rate=[1e-2, 1e-3, 1e-1], validation=held)
    tried: list[float] = []

    def trial(rate: float, folder: Path) -> float:
        tried.append(rate)
        assert folder == tmp_path / "out" / "checkpoints" / f"{rate:g}"
        if len(tried) == 3:
            raise KeyboardInterrupt
        return {1e-3: 0.2, 1e-2: 0.5, 1e-1: 0.5}[rate]

    with pytest.raises(KeyboardInterrupt):
        bias.choose_rate(settings, tmp_path / "out", trial)
    rate, found = bias.choose_rate(settings, tmp_path / "out", trial)
    assert tried == [1e-3, 1e-2, 1e-1, 1e-1], "what was measured is not measured again"
    assert rate == 1e-2 and found == {"0.001": 0.2, "0.01": 0.5, "0.1": 0.5}, "a tie goes to the smaller"
    whole = bias.train_bias(config(learning_rate=[1e-2, 1e-3], validation=held, out=str(tmp_path / "o2")))
    assert whole["learning_rate"] == 1e-3 and whole["steps"] == 3
    assert whole["validation"] == {"0.001": 0.0, "0.01": 0.0}
    same = config(learning_rate=[1e-2, 1e-1], rate_of=str(tmp_path / "o2"))
    assert bias.choose_rate(same, tmp_path, trial) == (1e-3, {})
    with pytest.raises(UserError, match="not a finished"):
        bias.choose_rate(config(rate_of=str(tmp_path / "none")), tmp_path, trial)


# ---- Bad input


def test_numbers_that_are_none_stop_the_run(
    config: Callable[..., BiasConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> float:
        raise RuntimeError("no answer")

    with monkeypatch.context() as m:
        m.setattr("neureasoner.models.load", lambda *_, **__: pytest.fail("the model was loaded before"))
        with pytest.raises(UserError, match=r"failed on problem 'arithmetic-train-1-\d': RuntimeError: no answer"):
            bias.train_bias(config(), reward=broken)
    assert not list((tmp_path / "out").glob("*")), "nothing was made, so other settings may use the folder"

    def later(problem: Any, response: str, finished: bool) -> float:
        return 1.0 if not response or "boxed" in response else broken()

    with pytest.raises(UserError, match=r"failed on problem 'arithmetic-train-1-\d': RuntimeError: no answer"):
        bias.train_bias(config(), reward=later)
    assert not (tmp_path / "out" / "direction").exists()

    def infinite(self: Any, model: Any, inputs: Any) -> torch.Tensor:
        return sum(p.sum() for p in model.parameters()) * float("nan")

    with monkeypatch.context() as m:
        m.setattr(policy_trainer.RlooTrainer, "_compute_loss", infinite)
        with pytest.raises(UserError, match="step 1: the loss is nan; lower learning_rate"):
            bias.train_bias(config(out=str(tmp_path / "o2")))

    trainer = bias.build(config(), 1e-2, 1, tmp_path / "c")
    for p in trainer.vectors.parameters:
        p.register_hook(lambda g: g * float("inf"))
    with pytest.raises(UserError, match=r"step 1: the gradient of model.layers.0.bias_vector.bias is NaN or infinite"):
        trainer.train()
    assert torch.equal(trainer.vectors.stack(), torch.zeros(2, 32)), "nothing reached the vectors"


def test_a_sampler_that_is_another_model_is_noticed(
    config: Callable[..., BiasConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = policy_trainer.sample

    def other(model: Any, *args: Any, **kwargs: Any) -> Any:
        done = real(model, *args, **kwargs)
        for row in done.rows:
            row.logprobs = [v - 0.3 for v in row.logprobs]
        return done

    monkeypatch.setattr(policy_trainer, "sample", other)
    with pytest.raises(UserError, match=r"trainer and sampler differ by 0\.300"):
        bias.train_bias(config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": "prefix"}, "key 'arm' must be one of vectors, lora, full"),
        ({"problems": ""}, "key 'problems' is missing: objective rloo"),
        ({"objective": "sft"}, "key 'traces' is missing"),
        ({"samples": 1}, "'samples' must be at least 2 for rloo"),
        ({"beta": 0.1}, "key 'beta' is for grpo"),
        ({"temperature": 0.0}, "greedy samples are all alike"),
        ({"warmup": 1.0}, "must lie in"),
        ({"max_grad_norm": 0.0}, "above 0"),
        ({"learning_rate": [1e-3, 0.0]}, "numbers above 0"),
        ({"learning_rate": [1e-3, 1e-2]}, "key 'validation' is missing"),
        ({"trial_steps": 4, "learning_rate": [1e-3, 1e-2], "validation": "v"}, r"'trial_steps' \(4\) must not exceed"),
        ({"micro_batch": 3}, "no multiple of micro_batch 3"),
        ({"kinds": ["words"]}, "not FAMILY:DIFFICULTY"),
        ({"template": "Solve it."}, "must hold {question}"),
        ({"steps": 0}, "'steps' must be at least 1"),
        ({"steps": 1, "warmup": 0.03}, r"'steps' is 1.*learning_rate.*warmup"),
        ({"warmup": 0.03, "learning_rate": [1e-3, 1e-2], "validation": "v"}, r"'trial_steps' is 1.*warmup"),
    ],
)
def test_settings_that_cannot_be_meant(config: Callable[..., BiasConfig], changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


@pytest.mark.parametrize(("arm", "objective"), [("vectors", "rloo"), ("lora", "grpo"), ("full", "rloo")])
def test_rewards_that_never_differ_train_nothing_and_it_is_said(
    config: Callable[..., BiasConfig], tmp_path: Path, arm: str, objective: str
) -> None:
    settings = config(arm=arm, objective=objective, steps=2)
    for _ in range(2):  # also when the finished updates are resumed
        with pytest.raises(UserError, match=r"2 updates changed no weight.*reward"):
            bias.train_bias(settings, reward=lambda *_: -1.0)
        assert not (tmp_path / "out" / "stage.json").exists()


def test_data_that_does_not_do_is_refused_before_anything_is_made(
    config: Callable[..., BiasConfig], problem_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="8 problems, fewer than one update's 12"):
        bias.train_bias(config(prompts=12))
    with pytest.raises(UserError, match="holds no problem of words:1; it holds arithmetic:1, arithmetic:2"):
        bias.train_bias(config(kinds=["words:1"]))
    with pytest.raises(UserError, match="'arithmetic-train-1-0' is a training problem too"):
        bias.train_bias(config(validation=str(problem_file)))
    with pytest.raises(UserError, match="not supported"):
        bias.train_bias(config(model=_gpt2(tmp_path / "gpt2")))
    bias.train_bias(config(steps=1))  # the refused ones left the folder free
    with pytest.raises(UserError, match="other settings"):
        bias.train_bias(config(steps=2))


def _gpt2(folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    return str(folder)


def test_the_published_settings_parse() -> None:
    """The values of core.md §4.2 for Qwen2.5-Math-7B."""
    from neureasoner.config import parse

    path = Path(__file__).parents[2] / "configs" / "recipes" / "Qwen2.5-Math-7B" / "bias.yaml"
    found = parse(BiasConfig, ["--config", str(path), "--problems", "p", "--out", "o"], "training bias", "")
    assert (found.prompts, found.samples, found.steps, found.max_new_tokens) == (16 * 8, 16, 314, 4096)
    assert (found.objective, found.learning_rate, found.warmup, found.max_grad_norm) == ("rloo", [1e-3], 0.03, 2.0)
    assert (found.lora_rank, found.lora_alpha, found.temperature, found.reward) == (4, 4, 1.0, "verified")


# ---- Killed for real


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_vectors(config: Callable[..., BiasConfig], tmp_path: Path) -> None:
    """SIGKILL at ever later moments, also while a checkpoint is written."""
    settings = config(steps=30, out=str(tmp_path / "whole"))
    whole = bias.train_bias(settings)
    command = [sys.executable, "-m", "neureasoner.cli", "training", "bias", "--out", str(tmp_path / "killed")]
    keys = ("model", "problems", "steps", "trial_steps", "prompts", "samples", "micro_batch", "max_new_tokens")
    for key in (*keys, "save_steps", "reward", "warmup"):
        command += [f"--{key}", str(getattr(settings, key))]
    command += ["--learning_rate", "1e-2"]
    for wait in (0.1, 0.25, 0.4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        checkpoints = tmp_path / "killed" / "checkpoints"
        n = len(list(checkpoints.glob("*/checkpoint-*"))) if checkpoints.exists() else 0
        seen = {p.name for p in checkpoints.glob("*/checkpoint-*")} if n else set()
        while process.poll() is None and {p.name for p in checkpoints.glob("*/checkpoint-*")} <= seen:
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "killed" / "stage.json").read_text())["summary"]
    assert {k: v for k, v in found.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    a, b = (Direction.load(tmp_path / run / "direction") for run in ("whole", "killed"))
    assert torch.equal(stacked(a, 2), stacked(b, 2))
    shutil.rmtree(tmp_path / "killed")
