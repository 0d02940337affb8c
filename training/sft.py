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

Run it again after an interruption: it goes on from the last whole checkpoint in ``out/checkpoints``
(``resume_from_checkpoint``: another one, or false for the start). ``out`` is complete once it holds ``stage.json``:
model and tokenizer, ``log.json``, ``loss.png``. The optimizer and random states of a checkpoint are torch files of the
Trainer's; it reads them with ``weights_only=True``, which runs no code. Nothing else reads them.

What cannot train anything, and options that would be replaced, are refused with one line, before the model is loaded
where that can be known. Taught tokens whose rows the base never trained get new ones (``redraw_rows``).
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from neureasoner.artifacts import write_json
from neureasoner.errors import UserError
from neureasoner.training import arguments, sft_options
from neureasoner.training.arguments import launched_with, one_line
from neureasoner.training.sft_config import PAPER, SftArguments, settings_of, usage
from neureasoner.training.sft_options import check_machine
from neureasoner.training.sft_rows import encoded, lora_config, prepare_rows, ready_tokenizer

HINT = (
    "their gradients are 0, or the updates are below the weights' precision; raise learning_rate, or set dtype: float32"
)


def parse(argv: Sequence[str] | None = None) -> tuple[SftArguments, Any]:
    """Command line and YAML file → (our arguments, TRL's). Raises UserError with one line.

    What is written there and has no effect is printed.
    """
    from trl import SFTConfig

    types: Any = (SftArguments, SFTConfig)
    (script, args), written = arguments.parse(types, argv, presets)
    if not script.out and "output_dir" in written:
        script.out = args.output_dir
    if not script.out or not script.data:
        raise UserError("--data (train.jsonl) and --out (folder for the model) are needed")
    arguments.check_numbers(args)
    idle = sft_options.check(script, args, written)
    if args.process_index == 0:
        print("".join(f"training sft: {line}\n" for line in idle), end="")
    return script, args


def presets(written: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's values, and what this machine has. ``written``: what the user wrote, which comes before them."""
    import torch

    arguments.refuse_best(written)
    gpu = torch.cuda.is_available()
    machine: dict[str, Any] = {"use_cpu": not gpu, "bf16": gpu and str(written.get("fp16")).lower() != "true"}
    if not {"gradient_checkpointing", "activation_checkpointing"} & set(written):  # two names of one option
        machine[arguments.checkpointing()] = gpu
    if launched_with("DEEPSPEED") and not gpu:
        # DeepSpeed finds the CPU by itself (Accelerate leaves DeepSpeed out where it is told), but needs to be told how
        # the processes talk: Accelerate would count one of them only.
        machine |= {"use_cpu": False, "ddp_backend": "gloo"}
    return PAPER | machine


def build(script: SftArguments, args: Any, callbacks: Sequence[Any] = ()) -> tuple[Any, dict[str, Any]]:
    """Rows, model, triggers and trainer. Returns (trainer, what the summary says of the data). Changes ``args``."""
    from datasets import Dataset
    from transformers import set_seed
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils.logging import disable_progress_bar

    from neureasoner.models import load
    from neureasoner.training.batches import TriggerTrainer
    from neureasoner.training.effect import check_rates
    from neureasoner.training.triggers import add_tokens, trigger_ids

    # ---- Seed
    check_machine(script, args)
    set_seed(args.seed)
    disable_progress_bar()
    main_process = args.process_index == 0

    def say(line: str) -> None:
        if main_process:
            print(f"training sft: {line}", flush=True)

    # ---- What is wrong with settings and rows is said before the model is loaded
    args.gradient_accumulation_steps = script.batch_size // (args.per_device_train_batch_size * args.world_size)
    args.output_dir = str(Path(script.out) / "checkpoints")
    tokenizer = ready_tokenizer(script, args)
    new = add_tokens(tokenizer, script.triggers) if script.add_triggers else []
    sets, about = encoded(script, args, tokenizer, say)
    if not args.packing:
        check_rates(args, len(sets["train"]), "batch_size", script.batch_size, say)

    # ---- Model and rows
    device = args.device if is_deepspeed_zero3_enabled() else "cpu"  # ZeRO-3 has placed its parts already
    model, _ = load(script.model, device=device, dtype=script.dtype)
    model.name_or_path = script.model  # what an adapter calls its base
    if script.attention != model.config._attn_implementation:
        try:
            model.set_attn_implementation(script.attention)
        except (ImportError, ValueError) as e:
            raise UserError(f"attention {script.attention!r}: {one_line(e)}") from None
    if args.eos_token:
        say(f"rows end with {args.eos_token!r} (eos_token); generation still stops at the model's own end tokens, too")
    rows, drawn = prepare_rows(script, args, model, tokenizer, new, sets, say)
    if script.dtype != "float32" and not script.lora and not launched_with("DEEPSPEED"):
        say(f"dtype {script.dtype}: updates below its precision are lost; float32 with bf16: true loses none")

    # ---- Trainer: labels are ours
    args.dataset_kwargs = {"skip_prepare_dataset": not args.packing}
    if not args.packing:
        args.max_length = None  # checked above
    if "held_out" in sets and args.eval_strategy == "no":
        args.eval_strategy = type(args.eval_strategy)("epoch")
    try:
        trainer = TriggerTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(sets["train"]),
            eval_dataset=Dataset.from_list(sets["held_out"]) if "held_out" in sets else None,
            processing_class=tokenizer,
            callbacks=list(callbacks),
            peft_config=lora_config(script, model, rows) if script.lora else None,
        )
    except (ValueError, RuntimeError, ImportError) as e:
        raise UserError(f"TRL refuses these settings: {one_line(e)}") from e
    if script.lora:  # PEFT would add both whole matrices where they grew; every new row is a trigger's, saved anyway
        adapted: Any = trainer.model
        adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    if args.packing:
        check_rates(args, len(cast(Any, trainer.train_dataset)), "batch_size", script.batch_size, say)
    return trainer, {"data": about, "triggers": trigger_ids(tokenizer, script.triggers), "redrawn": drawn}


def main(script: SftArguments, args: Any, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train, and leave a model folder in ``script.out``. Returns the summary of ``stage.json``."""
    from neureasoner.model_files import model_files
    from neureasoner.stages import STARTED, StageFolder
    from neureasoner.training.checkpoints import any_checkpoint, check_resumable, resume_point, save_whole
    from neureasoner.training.effect import Moved, NothingMoved, updates_of

    # ---- Done already?
    inputs: list[str | Path] = [script.data, *model_files(script.model)]
    inputs += [args.chat_template_path] if args.chat_template_path else []
    stage = StageFolder(script.out, "training sft", settings_of(script, args), inputs)
    main_process, folder = args.process_index == 0, stage.path / "checkpoints"
    if stage.done:
        if main_process:
            print(f"training sft: {script.out} is done; nothing to do")
        return stage.summary

    # ---- Build, train, resume
    try:
        checkpoint = resume_point(args.resume_from_checkpoint, folder)
        trainer, about = build(script, args, callbacks)
        moved, rows = Moved(trainer.model), trainer.train_dataset
        if checkpoint:
            check_resumable(checkpoint, folder, updates_of(args, len(rows)), bool(script.lora))
        trainer.add_callback(moved)
        if main_process:
            tell(about["data"]["train"], checkpoint, folder if args.resume_from_checkpoint else None)
        train(trainer, checkpoint)
        still = moved.check(trainer, HINT)
    except UserError as e:
        if isinstance(e, NothingMoved) and main_process:
            shutil.rmtree(folder, ignore_errors=True)  # its checkpoints are the base, and would be resumed
        if not any_checkpoint(folder):
            (stage.path / STARTED).unlink(missing_ok=True)  # nothing was made: other settings may use the folder
        raise
    if still and main_process:
        print(f"training sft: {still}")

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


def tell(counts: Mapping[str, int], checkpoint: str | None, wanted: Path | None) -> None:
    """Print what begins. ``wanted``: the folder in which a checkpoint was asked for."""
    start = f"resuming from {Path(checkpoint).name}" if checkpoint else "from the start"
    if wanted and not checkpoint:
        start += f": no whole checkpoint in {wanted}"
    tokens = f"{counts['trained']} of {counts['tokens']} tokens train, longest {counts['longest']}"
    print(f"training sft: {counts['rows']} rows, {tokens}; {start}", flush=True)


def train(trainer: Any, checkpoint: str | None) -> None:
    """Train, from ``checkpoint`` on. What a setting or a checkpoint is to blame for is a UserError."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ImportError as e:  # an optimizer, a logger
        raise UserError(f"a setting needs a package that is not installed: {one_line(e)}") from e
    except (RuntimeError, ValueError) as e:
        if checkpoint and re.search(r"state.dict", str(e)):
            reason = one_line(e)[:200]
            raise UserError(f"resume_from_checkpoint: {checkpoint} is of another model or run ({reason})") from e
        raise


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
