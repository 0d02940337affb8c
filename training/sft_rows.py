"""What ``training/sft.py`` trains on: the tokenizer, the encoded rows, and the rows of the model's matrices."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neureasoner.errors import UserError
from neureasoner.training.arguments import one_line
from neureasoner.training.sft_config import SftArguments


def ready_tokenizer(script: SftArguments, args: Any) -> Any:
    """The model's tokenizer, with the chat template, EOS and padding that were asked for. Raises UserError."""
    from neureasoner.models import load_tokenizer
    from neureasoner.prompts import prompt_text

    tokenizer = load_tokenizer(script.model)
    if args.chat_template_path:
        try:
            tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
            prompt_text(tokenizer, "?")
        except (OSError, UnicodeDecodeError, UserError) as e:
            raise UserError(f"chat_template_path: {args.chat_template_path} is no template ({one_line(e)})") from None
        args.chat_template_path = None  # done; TRL would read it after the rows are encoded
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name)
        if token and token not in tokenizer.get_vocab():
            raise UserError(f"{name} {token!r} is no token of {script.model}; name one that is")
        if token:
            setattr(tokenizer, name, token)
    return tokenizer


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


def encoded(script: SftArguments, args: Any, tokenizer: Any, say: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """``({"train", "held_out"}: rows with labels, what the summary says of them)``; no row is ever cut."""
    from neureasoner.data_builders.layouts import read_reconstructions
    from neureasoner.training.masks import encode_all
    from neureasoner.training.templates import open_once
    from neureasoner.training.triggers import trigger_ids

    train, held = split_problems(read_reconstructions(script.data), script.eval_share, args.seed)
    limit = min(args.max_length or sys.maxsize, longest_of(script.model))
    triggers = trigger_ids(tokenizer, script.triggers)
    sets, about = {}, {}
    for name, rows in (("train", train), ("held_out", held)):
        if rows:
            rows = open_once(rows, tokenizer)
            sets[name], counts = encode_all(rows, tokenizer, triggers, script.mask_failure, limit, script.too_long, say)
            about[name] = dict(counts)
    return sets, about


def longest_of(name: str) -> int:
    """Tokens that a model's positions go up to. Raises UserError for a config that cannot be read."""
    from neureasoner.models import read_config

    return int(getattr(read_config(name).get_text_config(), "max_position_embeddings", None) or sys.maxsize)


def prepare_rows(
    script: SftArguments, args: Any, model: Any, tokenizer: Any, new: Sequence[str], sets: Mapping[str, Any], say: Any
) -> tuple[dict[str, list[int]], dict[str, list[str]]]:
    """Rows of the triggers, and of taught tokens without an identity. ``new``: triggers that were no tokens before.

    Returns (the rows of each matrix that LoRA has to train, ``{matrix: tokens}`` that were drawn anew).
    """
    from neureasoner.data_builders.encoding import IGNORE
    from neureasoner.training.identity import lost_rows, matrices, redraw, told
    from neureasoner.training.triggers import start_rows, trigger_ids

    triggers: list[int] = []
    if script.add_triggers:
        about_them = dict(zip(script.triggers, script.trigger_descriptions, strict=False))
        apart = start_rows(model, tokenizer, script.triggers, new, script.trigger_init, about_them, args.seed)
        triggers = [ids[0] for ids in trigger_ids(tokenizer, script.triggers).values()]
        if apart:
            say(f"{' and '.join(apart)} began as one vector; moved apart by a small step (seed {args.seed})")
    taught = {label for row in sets["train"] for label in row["labels"] if label != IGNORE} - set(triggers)
    if script.trigger_init == "keep":
        taught |= {i for i in triggers if tokenizer.convert_ids_to_tokens(i) in new}
    lost = lost_rows(model, sorted(taught))
    drawn = redraw(model, sorted(taught), lost, args.seed) if script.redraw_rows else {}
    count = len({i for ids in lost.values() for i in ids})
    if count:
        done = "drawn anew" if drawn else "left so (redraw_rows is false)"
        if script.redraw_rows and not drawn:
            done = "left so: too few tokens have rows to go by, so these may come out as one another"
        say(f"{count} of {len(taught)} taught tokens have no row of their own: {told(lost, tokenizer)}: {done}")
    rows = {part: [*triggers, *drawn.get(part, ())] for part in matrices(model)}
    return rows, {part: [tokenizer.convert_ids_to_tokens(i) for i in ids] for part, ids in drawn.items()}


def lora_config(script: SftArguments, model: Any, rows: Mapping[str, Sequence[int]]) -> Any:
    """PEFT's settings: every linear layer, and ``rows`` of the input and output matrices, which train and are saved."""
    from peft import LoraConfig

    parts = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora,
        lora_alpha=script.lora_alpha or 2 * script.lora,
        lora_dropout=script.lora_dropout,
        target_modules="all-linear",
        trainable_token_indices={names[parts[part]]: sorted(ids) for part, ids in rows.items() if ids} or None,
    )
