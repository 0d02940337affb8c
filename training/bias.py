"""``training bias``: bias vectors, LoRA or the whole model, by RL on verifiable answers or by SFT (core.md §4).

    neureasoner training bias --model tiny --problems runs/p/problems.jsonl --out runs/vectors
    accelerate launch --num_processes 8 training/bias.py --config bias.yaml     # several devices: untried

Kill it at any time; the same command goes on from the last whole checkpoint and draws what it would have drawn. Several
learning rates each get ``trial_steps`` updates, the one that does best on validation problems goes on to ``steps``:
after its warm-up the rate is constant, so a trial is the beginning of the run.

``out`` is complete once it holds ``stage.json``. ``direction/``: the vectors arm, as a Direction. ``model/``: the LoRA
(merged) and full arms, a plain model folder; ``adapter/``: LoRA before merging. ``log.json``, ``curve.png``, and
``rates.json`` where there were trials.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json, write_json
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.stages import MARK, STARTED, StageFolder
from neureasoner.traces import Problem, read_traces
from neureasoner.training.bias_config import BiasConfig

DIRECTION, MODEL, ADAPTER, CHECKPOINTS = "direction", "model", "adapter", "checkpoints"
SFT_HINT = "the updates are below the weights' precision; raise learning_rate, or set dtype: float32"
RL_HINT = (
    "all responses to a problem had the same reward, or the updates are below the weights' precision; choose problems "
    "that are solved sometimes (kinds), more samples, or a higher learning_rate"
)
TAIL = 10  # steps at either end over which the log's figures are averaged


def _device(config: BiasConfig) -> Any:
    import torch

    from neureasoner.models import default_device

    return torch.device(config.device) if config.device else default_device()


def _arguments(config: BiasConfig, rate: float, steps: int, folder: Path) -> Any:
    """TRL's settings of one run. The learning rate is constant after a warm-up that counts ``config.steps``."""
    from accelerate import PartialState
    from trl import GRPOConfig, RLOOConfig, SFTConfig

    from neureasoner.training.arguments import checkpointing

    device = _device(config)
    parts = config.rows // config.micro_batch
    world = PartialState(cpu=device.type == "cpu").num_processes
    if parts % world:
        raise UserError(
            f"{parts} backward passes of micro_batch {config.micro_batch} cannot be shared by {world} devices"
        )
    shared: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": math.ceil(config.warmup * config.steps),
        "weight_decay": 0.0,
        "max_grad_norm": config.max_grad_norm,
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": parts // world,
        checkpointing(): False,
        "bf16": False,
        "use_cpu": device.type == "cpu",
        "seed": config.seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if config.objective == "sft":
        return SFTConfig(**shared, max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True})
    shared |= {
        "num_generations": config.samples,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "mask_truncated_completions": False,  # a truncated response is wrong, and trains as one
        "beta": config.beta,
    }
    if config.objective == "rloo":
        return RLOOConfig(**shared)
    return GRPOConfig(**shared, scale_rewards=config.scale_rewards, loss_type=config.loss_type)


def _sft_rows(config: BiasConfig) -> list[dict[str, list[int]]]:
    """Right, finished traces as ``input_ids`` and ``labels`` (-100 on the prompt)."""
    from neureasoner.data_builders.encoding import IGNORE
    from neureasoner.models import load_tokenizer
    from neureasoner.steps import Separators
    from neureasoner.training.rewards import is_right

    kinds = config.kinds
    traces = [
        t for t in read_traces(config.traces) if not kinds or f"{t.problem.family}:{t.problem.difficulty}" in kinds
    ]
    right = [t for t in traces if is_right(t.problem, t.response, t.finished, config.answer)]
    if len(right) < config.rows:
        raise UserError(
            f"{config.traces}: {len(right)} right, finished traces, fewer than one batch of {config.rows}; sample more "
            "traces, or lower prompts or samples"
        )
    separators = Separators.of(load_tokenizer(config.model))
    for t in right:
        if separators.offsets(t.response_ids)[0] != t.response:
            raise UserError(
                f"{config.traces}: trace '{t.id}' is in the tokens of another model than {config.model}; sample traces "
                "with this one"
            )
    return [
        {"input_ids": t.prompt_ids + t.response_ids, "labels": [IGNORE] * len(t.prompt_ids) + t.response_ids}
        for t in right
    ]


def _problems(config: BiasConfig) -> tuple[list[Problem], list[Problem]]:
    """(training, validation) problems, checked. Raises UserError for too few, shared, or unrewardable ones."""
    from neureasoner.data_builders.corpus import same_question
    from neureasoner.training.policy_measure import choose_problems
    from neureasoner.training.rewards import check_gold

    held = choose_problems(config.validation, config.kinds) if config.validation else []
    sft = config.objective == "sft"
    train = [t.problem for t in read_traces(config.traces)] if sft else choose_problems(config.problems, config.kinds)
    if not sft and len(train) < config.prompts:
        raise UserError(
            f"{config.problems}: {len(train)} problems, fewer than one update's {config.prompts}; make more problems, "
            "choose more kinds, or lower prompts"
        )
    known = {same_question(p.question) for p in train}
    shared = [p.id for p in held if same_question(p.question) in known]
    if shared:
        raise UserError(f"{config.validation}: problem '{shared[0]}' is a training problem too; make another split")
    check_gold(held if sft else [*train, *held], config.answer)
    return train, held


def build(config: BiasConfig, rate: float, steps: int, folder: Path, reward: Any = None) -> Any:
    """The trainer of one run, with ``trainer.vectors`` set in the vectors arm. ``reward``: instead of the named one."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from transformers.utils.logging import disable_progress_bar

    from neureasoner.models import load
    from neureasoner.training import policy_trainer as trainers
    from neureasoner.training.finite import Guard
    from neureasoner.training.policy_measure import prompt_of
    from neureasoner.training.rewards import named
    from neureasoner.training.vectors import BiasVectors

    disable_progress_bar()
    args = _arguments(config, rate, steps, folder)
    # what is trained on is read and checked first: the model may take minutes
    sft_rows = _sft_rows(config) if config.objective == "sft" else []
    problems = [] if sft_rows else _problems(config)[0]
    dtype = config.dtype or (torch.float32 if config.arm == "full" else None)  # steps of 1e-6 would round away
    model, tokenizer = load(config.model, device=_device(config), dtype=dtype)
    vectors = BiasVectors(model) if config.arm == "vectors" else None
    if vectors is not None:
        vectors.freeze_rest()
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    common: dict[str, Any] = {
        "model": model,
        "args": args,
        "processing_class": tokenizer,
        "peft_config": lora if config.arm == "lora" else None,
    }
    if config.objective == "sft":
        trainer: Any = trainers.PlainTrainer(train_dataset=Dataset.from_list(sft_rows), **common)
    else:
        chosen = reward or named(config.reward, config.answer)
        rows = [{"prompt": prompt_of(tokenizer, p, config.template), "row": i} for i, p in enumerate(problems)]
        kind = trainers.RlooTrainer if config.objective == "rloo" else trainers.GrpoTrainer
        holder: list[Any] = []  # the trainer wants its reward function before there is a trainer
        trainer = kind(
            reward_funcs=lambda prompts, completions, **columns: holder[0].reward_of(**columns),
            train_dataset=Dataset.from_list(rows),
            **common,
        )
        holder.append(trainer)
        trainer.task = trainers.Task(problems, chosen, config.answer, config.seed)
    trainer.vectors = vectors
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(trainers.PolicyLines())
    trainer.add_callback(Guard())
    return trainer


def train(config: BiasConfig, rate: float, steps: int, folder: Path, reward: Any = None) -> Any:
    """Build, resume from the last whole checkpoint in ``folder`` if there is one, train to ``steps``. The trainer.

    Its ``moved`` knows what was trained from.
    """
    from neureasoner.training.checkpoints import last_whole
    from neureasoner.training.effect import Moved

    trainer = build(config, rate, steps, folder, reward)
    trainer.moved = Moved(trainer.model)
    trainer.add_callback(trainer.moved)
    checkpoint = last_whole(folder)
    print(
        f"training bias: rate {rate:g}, "
        + (f"resuming from {Path(checkpoint).name}" if checkpoint else "from the start")
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def _accuracy(config: BiasConfig, trainer: Any, problems: Sequence[Problem]) -> float:
    from neureasoner.training.policy_measure import measure

    answers = measure(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        problems,
        samples=config.validation_samples,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.rows,
        seed=config.seed,
        template=config.template,
        answer=config.answer,
    )
    return sum(a.correct for a in answers) / len(answers)


def choose_rate(config: BiasConfig, out: Path, trial: Callable[[float, Path], float]) -> tuple[float, dict[str, float]]:
    """(the learning rate, validation accuracy of each tried). ``trial(rate, folder)`` trains and measures one.

    One rate needs no trial. A tie goes to the smaller rate. Finished trials are kept in ``rates.json``.
    """
    if config.rate_of:
        mark = Path(config.rate_of) / MARK
        if not mark.is_file():
            raise UserError(f"key 'rate_of': {config.rate_of} is not a finished `training bias` run")
        return float(read_json(mark)["summary"]["learning_rate"]), {}
    rates = sorted(set(config.learning_rate))
    if len(rates) == 1:
        return rates[0], {}
    file = out / "rates.json"
    tried: dict[str, float] = read_json(file) if file.is_file() else {}
    for rate in rates:
        if f"{rate:g}" not in tried:
            tried[f"{rate:g}"] = round(trial(rate, _folder(out, rate)), 4)
            write_json(file, tried)
            print(f"training bias: rate {rate:g} gives {tried[f'{rate:g}']:.1%} on validation problems", flush=True)
    return max(rates, key=lambda r: (tried[f"{r:g}"], -r)), tried


def _folder(out: Path, rate: float) -> Path:
    return out / CHECKPOINTS / f"{rate:g}"


def train_bias(config: BiasConfig, reward: Any = None) -> dict[str, Any]:
    """Stage ``training bias``. Returns the summary of ``stage.json``. ``reward``: a ``rewards.Reward`` of your own."""
    from neureasoner.training.rewards import check_reward, named

    given = [config.problems, config.traces, config.validation]
    given += [str(Path(config.rate_of) / MARK)] if config.rate_of else []
    inputs: list[str | Path] = [*[p for p in given if p], *model_files(config.model)]
    folder = StageFolder(config.out, "training bias", config, inputs=inputs)
    if folder.done:
        return folder.summary
    out = folder.path
    try:
        problems, held = _problems(config)
        if config.objective != "sft" and (reward or ":" in config.reward):
            check_reward(reward or named(config.reward), problems, config.answer)

        def trial(rate: float, where: Path) -> float:
            return _accuracy(config, train(config, rate, config.trial_steps, where, reward), held)

        rate, tried = choose_rate(config, out, trial)
        trainer = train(config, rate, config.steps, _folder(out, rate), reward)
        still = trainer.moved.check(trainer, SFT_HINT if config.objective == "sft" else RL_HINT)
        if still and trainer.is_world_process_zero():
            print(f"training bias: {still}")
    except UserError:
        if not list((out / CHECKPOINTS).glob("*/checkpoint-*")):
            (out / STARTED).unlink(missing_ok=True)  # nothing was made: other settings may use the folder
        raise
    about = _sizes(trainer)
    if not trainer.is_world_process_zero():
        return {}
    _save(config, trainer, out)
    history = [h for h in trainer.state.log_history if "loss" in h]
    write_json(out / "log.json", history)
    from neureasoner.training.bias_figure import plot

    plot(history, out / "curve.png")
    summary = {
        "arm": config.arm,
        "objective": config.objective,
        "reward": config.reward,
        "steps": trainer.state.global_step,
        "learning_rate": rate,
        "validation": tried,
        **about,
        **_history(history),
    }
    folder.finish(summary)
    shutil.rmtree(out / CHECKPOINTS)  # only now: a kill before this line costs nothing
    return summary


def _sizes(trainer: Any) -> dict[str, int]:
    """Trained parameters, and bytes that the optimiser's state really takes."""
    import torch

    states = trainer.optimizer.state.values()
    tensors = [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]
    return {
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "optimizer_bytes": sum(t.numel() * t.element_size() for t in tensors),
    }


def _history(history: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over the first and the last steps, seconds per step, and the largest gap of trainer and sampler."""
    import numpy as np

    def mean(key: str, rows: Sequence[dict[str, float]]) -> float:
        values = [r[key] for r in rows if r.get(key) is not None]
        return round(float(np.mean(values)), 4) if values else float("nan")

    ends = {"first": history[:TAIL], "last": history[-TAIL:]}
    if "right" not in history[0]:
        return {"loss": {k: mean("loss", rows) for k, rows in ends.items()}}
    return {
        "right": {k: mean("right", rows) for k, rows in ends.items()},
        "tokens": {k: mean("completions/mean_length", rows) for k, rows in ends.items()},
        "entropy": {k: mean("entropy", rows) for k, rows in ends.items()},
        "seconds": {"step": mean("step_time", history), "sampling": mean("sampling_time", history)},
        "gap": max(r["gap"] for r in history),
    }


def _save(config: BiasConfig, trainer: Any, out: Path) -> None:
    """The result: ``direction/``, or ``model/`` (and ``adapter/``)."""
    from neureasoner.models import fingerprint

    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.vectors is not None:
        values = trainer.vectors.stack()
        trainer.vectors.detach()
        about = {"estimator": f"bias vectors, {config.objective}", "steps": trainer.state.global_step}
        about |= {"reward": config.reward, "seed": config.seed}
        meaning = f"positive = towards the policy that {config.objective} trained ({config.reward} rewards)"
        from neureasoner.training.vectors import direction_of

        direction_of(values, meaning, config.model, fingerprint(model), about).save(out / DIRECTION)
        return
    if config.arm == "lora":
        model.save_pretrained(out / ADAPTER)
        model = model.merge_and_unload()
    model.save_pretrained(out / MODEL)
    trainer.processing_class.save_pretrained(out / MODEL)


if __name__ == "__main__":
    from neureasoner.config import parse

    try:
        train_bias(parse(BiasConfig, sys.argv[1:], "training bias", __doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
