"""Teach a model to repair itself when it sees ``<INTRA>`` or ``<INTER>`` (core.md §1.9), with TRL under Accelerate.

    accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \\
        training/sft.py --config configs/recipes/tiny/sft.yaml --data runs/reconstruct/train.jsonl --out runs/sft

    accelerate launch --config_file configs/accelerate/cpu.yaml training/sft.py --config …      # the same
    accelerate launch --config_file configs/accelerate/zero2.yaml \\
        training/sft.py --config configs/recipes/DeepSeek-R1-Distill-Qwen-7B/sft.yaml --data … --out …

A key of the YAML file sets a default, the command line overrides it, unknown keys are refused. Defaults are the
paper's. The batch size counts over all devices. CPU or GPU, and bf16, are chosen by what is there. ``--lora 32`` trains
an adapter and the triggers' rows instead of everything; ``neureasoner training merge`` makes a plain model of it.
docs/training.md says which layout fits which model.

Run it again after an interruption: it goes on from the last whole checkpoint in ``out/checkpoints``. ``out`` is
complete once it holds ``stage.json``: model and tokenizer, ``log.json``, ``loss.png``. The optimizer and random states
of a checkpoint are torch files of the Trainer's; it reads them with ``weights_only=True``, which runs no code. Nothing
else reads them.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from neureasoner.artifacts import write_json
from neureasoner.errors import UserError
from neureasoner.training.sft_config import PAPER, SftArguments, settings_of, usage


def parse(argv: Sequence[str] | None = None) -> tuple[SftArguments, Any]:
    """Command line and YAML file → (our arguments, TRL's). Raises UserError with one line."""
    import torch
    import yaml
    from trl import SFTConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            raise UserError(message)

    gpu = torch.cuda.is_available()
    types: Any = (SftArguments, SFTConfig)
    parser = Parser(types, allow_abbrev=False)
    machine: dict[str, Any] = {"use_cpu": not gpu, "bf16": gpu, "activation_checkpointing": gpu}
    if launched_with("DEEPSPEED") and not gpu:
        # DeepSpeed finds the CPU by itself (Accelerate leaves DeepSpeed out where it is told), but needs to be told how
        # the processes talk: Accelerate would count one of them only.
        machine |= {"use_cpu": False, "ddp_backend": "gloo"}
    parser.set_defaults_with_config(**PAPER, **machine)
    try:
        script, args = parser.parse_args_and_config(argv)
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}") from None
    except (ValueError, yaml.YAMLError) as e:
        raise UserError(" ".join(str(e).split())) from None
    if not script.out and args.output_dir != "trainer_output":
        script.out = args.output_dir
    if not script.out or not script.data:
        raise UserError("--data (train.jsonl) and --out (folder for the model) are needed")
    return script, args


def launched_with(what: str) -> bool:
    """Whether ``accelerate launch`` was told to use ``DEEPSPEED`` or ``FSDP``."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def split_problems(rows: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(train, held out): a problem's rows stay together. Raises UserError for a share that leaves either empty."""
    problems = sorted({row.problem.id for row in rows})
    random.Random(seed).shuffle(problems)
    n = round(share * len(problems))
    if n == len(problems) or (share and not n):
        raise UserError(
            f"eval_share {share:g} of {len(problems)} problems holds out {n}, so nothing is left to "
            f"{'train on' if n else 'evaluate on'}; change it, or give more rows"
        )
    held = set(problems[:n])
    return [r for r in rows if r.problem.id not in held], [r for r in rows if r.problem.id in held]


def check_machine(script: SftArguments, args: Any) -> None:
    """Refuse what this machine cannot do, before any long work. Raises UserError."""
    import torch

    if args.load_best_model_at_end:
        raise UserError("load_best_model_at_end is not supported: the last update is what is saved")
    if args.packing and args.packing_strategy != "bfd":
        raise UserError(
            f"packing_strategy {args.packing_strategy!r} cuts rows or lets them see each other; set it to 'bfd'"
        )
    if args.packing and not args.max_length:
        raise UserError("packing needs max_length, the size of a pack")
    if torch.cuda.is_available() and not args.use_cpu:
        return
    if args.use_liger_kernel:
        raise UserError("use_liger_kernel needs a GPU, and there is none; set it to false")
    if script.attention.startswith("flash"):
        raise UserError(f"attention {script.attention!r} needs a GPU, and there is none; set it to 'sdpa'")
    # In both cases Accelerate would run plain DDP without a word.
    if launched_with("FSDP"):
        raise UserError("Accelerate has FSDP on GPUs only, and there is none; use configs/accelerate/ddp.yaml")
    if launched_with("DEEPSPEED") and (args.use_cpu or os.environ.get("ACCELERATE_USE_CPU") == "true"):
        raise UserError("DeepSpeed is skipped where the CPU is asked for; leave use_cpu and ACCELERATE_USE_CPU out")


def lora_config(script: SftArguments, model: Any, trigger_rows: Sequence[int]) -> Any:
    """PEFT's settings: every linear layer, and the triggers' rows of both matrices (of the one, if they are tied)."""
    from peft import LoraConfig

    rows: Any = None
    if trigger_rows:
        inner, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
        tied = head is None or head.weight is inner.weight
        rows = {names[m]: list(trigger_rows) for m in ([inner] if tied else [inner, head])}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora,
        lora_alpha=script.lora_alpha or 2 * script.lora,
        lora_dropout=script.lora_dropout,
        target_modules="all-linear",
        trainable_token_indices=rows,
    )


def build(script: SftArguments, args: Any, callbacks: Sequence[Any] = ()) -> tuple[Any, dict[str, Any]]:
    """Model, triggers, rows and trainer. Returns (trainer, what the summary says of the data). Changes ``args``."""
    from datasets import Dataset
    from transformers import set_seed
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils.logging import disable_progress_bar

    from neureasoner.data_builders.layouts import read_reconstructions
    from neureasoner.models import load
    from neureasoner.training.batches import TriggerTrainer
    from neureasoner.training.masks import encode_all
    from neureasoner.training.templates import open_once
    from neureasoner.training.triggers import add_triggers, trigger_ids

    # ---- Seed
    check_machine(script, args)
    set_seed(args.seed)
    disable_progress_bar()

    # ---- What is wrong with settings and rows is said before the model is loaded
    train, held = split_problems(read_reconstructions(script.data), script.eval_share, args.seed)
    per_update = args.per_device_train_batch_size * args.world_size
    if script.batch_size % per_update:
        raise UserError(
            f"batch_size {script.batch_size} is no multiple of per_device_train_batch_size × devices = {per_update}"
        )
    args.gradient_accumulation_steps = script.batch_size // per_update
    args.output_dir = str(Path(script.out) / "checkpoints")

    # ---- Model and triggers
    device = args.device if is_deepspeed_zero3_enabled() else "cpu"  # ZeRO-3 has placed its parts already
    model, tokenizer = load(script.model, device=device, dtype=script.dtype)
    model.name_or_path = script.model  # what an adapter calls its base
    if script.attention != model.config._attn_implementation:
        model.set_attn_implementation(script.attention)
    if script.add_triggers:
        about_them = dict(zip(script.triggers, script.trigger_descriptions, strict=False))
        triggers = add_triggers(model, tokenizer, script.triggers, script.trigger_init, about_them)
    else:
        triggers = trigger_ids(tokenizer, script.triggers)
    added = [ids[0] for ids in triggers.values()] if script.add_triggers else []

    # ---- Data: labels are ours, and no row is ever cut
    say = print if args.process_index == 0 else lambda _: None
    limit = min(args.max_length or sys.maxsize, getattr(model.config, "max_position_embeddings", sys.maxsize))
    sets, about = {}, {}
    for name, rows in (("train", train), ("held_out", held)):
        if rows:
            rows = open_once(rows, tokenizer)
            encoded, counts = encode_all(rows, tokenizer, triggers, script.mask_failure, limit, script.too_long, say)
            sets[name], about[name] = Dataset.from_list(encoded), dict(counts)
    args.dataset_kwargs = {"skip_prepare_dataset": not args.packing}
    if not args.packing:
        args.max_length = None  # checked above
    if held and args.eval_strategy == "no":
        args.eval_strategy = type(args.eval_strategy)("epoch")

    trainer = TriggerTrainer(
        model=model,
        args=args,
        train_dataset=sets["train"],
        eval_dataset=sets.get("held_out"),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=lora_config(script, model, added) if script.lora else None,
    )
    if script.lora:  # PEFT would add both whole matrices where they grew; every new row is a trigger's, saved anyway
        adapted: Any = trainer.model
        adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return trainer, {"data": about, "triggers": triggers}


def main(script: SftArguments, args: Any, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train, and leave a model folder in ``script.out``. Returns the summary of ``stage.json``."""
    from neureasoner.model_files import model_files
    from neureasoner.stages import STARTED, StageFolder
    from neureasoner.training.checkpoints import last_whole, save_whole

    # ---- Done already?
    inputs: list[str | Path] = [script.data, *model_files(script.model)]
    stage = StageFolder(script.out, "training sft", settings_of(script, args), inputs)
    main_process = args.process_index == 0
    if stage.done:
        if main_process:
            print(f"training sft: {script.out} is done; nothing to do")
        return stage.summary

    # ---- Build, train, resume
    try:
        trainer, about = build(script, args, callbacks)
    except UserError:
        if not (stage.path / "checkpoints").exists():
            (stage.path / STARTED).unlink(missing_ok=True)  # nothing was made: other settings may use the folder
        raise
    counts = about["data"]["train"]
    checkpoint = args.resume_from_checkpoint or last_whole(args.output_dir)
    if main_process:
        start = f"resuming from {Path(checkpoint).name}" if checkpoint else "from the start"
        tokens = f"{counts['trained']} of {counts['tokens']} tokens train, longest {counts['longest']}"
        print(f"training sft: {counts['rows']} rows, {tokens}; {start}", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)

    # ---- Save: files whole, stage.json last
    out = Path(script.out)
    trainer.model.config.use_cache = True
    save_whole(trainer, out)
    history = trainer.state.log_history
    losses = [h["loss"] for h in history if "loss" in h]
    held_losses = [h["eval_loss"] for h in history if "eval_loss" in h]
    summary = {
        **about,
        "steps": trainer.state.global_step,
        "loss": [losses[0], losses[-1]] if losses else [],
        "eval_loss": held_losses[-1] if held_losses else None,
    }
    if main_process:
        write_json(out / "log.json", history)
        plot(history, out / "loss.png")
        summary = stage.finish(summary)
        print(f"training sft: {summary['steps']} steps, loss {summary['loss']}; model in {out}")
    trainer.accelerator.wait_for_everyone()
    return summary


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Loss over steps, on the training rows and the held-out ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, name in (("loss", "training"), ("eval_loss", "held-out problems")):
        points = [(h["step"], h[key]) for h in history if key in h]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if key == "loss" else "o", label=name)
    axes.set(xlabel="update", ylabel="loss per trained token (nats)")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__, usage(), sep="\n")
        sys.exit(0)
    try:
        main(*parse(["--help" if a == "--help_all" else a for a in sys.argv[1:]]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
