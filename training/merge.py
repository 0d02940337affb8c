"""Put a LoRA adapter and its trigger rows into the base's weights: a plain checkpoint that needs no PEFT.

Both models answer a text that holds the triggers before anything is written; they must agree in the trigger's logits.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json
from neureasoner.errors import UserError
from neureasoner.stages import MARK, STARTED, StageFolder
from neureasoner.training.tools_config import MergeConfig

PROBED = 64  # rows that the text holds; the triggers' are the last
TOLERANCE = 1e-3  # of the trigger logits, in float32
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def merge(config: MergeConfig) -> dict[str, Any]:
    """Merge ``config.adapter`` into its base. Returns the summary of ``stage.json``.

    ``{"base", "dtype", "triggers": {text: ids}, "redrawn", "logit_difference", "trigger_difference"}``: ``redrawn`` are
    the other tokens whose rows the adapter holds; the differences are the largest between adapter and merged model, in
    float32, over all logits and over those of all these tokens. Raises UserError for a folder without an adapter, a
    base of another shape, and a merge that changes the logits.
    """
    import torch

    from neureasoner.model_files import model_files
    from neureasoner.models import stored_dtype
    from neureasoner.training.checkpoints import put_whole

    folder = Path(config.adapter)
    for name in ADAPTER:
        if not (folder / name).is_file():
            hint = "; it is a plain model, nothing is to be merged" if (folder / "config.json").is_file() else ""
            raise UserError(f"{folder}: holds no {name}, so it is no adapter of 'training sft' with lora{hint}")
    base_name = config.model or str(read_json(folder / ADAPTER[0]).get("base_model_name_or_path") or "")
    if not base_name:
        raise UserError(f"{folder}: the adapter does not name its base; give it with --model")
    inputs = [folder / name for name in ADAPTER] + model_files(base_name)
    stage = StageFolder(config.out, "training merge", config, inputs)
    if stage.done:
        print(f"training merge: {config.out} is done; nothing to do")
        return stage.summary
    try:
        model, tokenizer, summary = merged(folder, base_name)
    except UserError:
        (stage.path / STARTED).unlink(missing_ok=True)  # nothing was made: another base may use the folder
        raise
    dtype = config.dtype or str(stored_dtype(base_name)).removeprefix("torch.")
    temporary = stage.path / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(dtype=getattr(torch, dtype)).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    put_whole(temporary, stage.path)
    summary = stage.finish({"base": base_name, "dtype": dtype, **summary})
    print(f"training merge: trigger logits differ by {summary['trigger_difference']:.1e}; model in {config.out}")
    return summary


def merged(folder: Path, base_name: str) -> tuple[Any, Any, dict[str, Any]]:
    """``(plain model in float32, tokenizer, {"triggers", "redrawn", "logit_difference", "trigger_difference"})``."""
    import torch
    from peft import PeftModel

    from neureasoner.models import load, read_tokenizer
    from neureasoner.training.triggers import grow
    from neureasoner.weights import check_file

    # ---- The small files first: the base may take minutes
    tokenizer = read_tokenizer(folder)
    check_file(folder / ADAPTER[1])
    base, _ = load(base_name, device="cpu", dtype="float32")
    grow(base, tokenizer)
    try:
        adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, ImportError, OSError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[-1].strip()
        raise UserError(
            f"{folder}: does not fit the base '{base_name}' ({reason}); name its base with --model"
        ) from None
    rows = read_json(folder / ADAPTER[0]).get("trainable_token_indices") or {}
    ids = sorted({i for part in (rows.values() if isinstance(rows, dict) else [rows]) for i in part})
    start = tokenizer("So the answer is", add_special_tokens=False).input_ids
    probe = torch.tensor([[*start, *(x for i in ids[-PROBED:] for x in (i, *start))]])
    with torch.no_grad():
        before = adapted(input_ids=probe).logits
        model = adapted.merge_and_unload()
        after = model(input_ids=probe).logits
    difference = (before - after).abs()
    triggers = difference[..., ids] if ids else difference
    if not float(triggers.max()) <= TOLERANCE:
        raise UserError(f"{folder}: merging changes the trigger logits by {float(triggers.max()):.2g}; not written")
    mark = folder / MARK
    # a checkpoint-N has no mark; then all are named as triggers
    known = read_json(mark)["summary"]["triggers"] if mark.is_file() else None
    named = {tokenizer.convert_ids_to_tokens(i): [i] for i in ids}
    found: dict[str, Any] = {
        "triggers": {text: i for text, i in named.items() if known is None or text in known},
        "redrawn": [text for text in named if known is not None and text not in known],
        "logit_difference": float(difference.max()),
        "trigger_difference": float(triggers.max()),
    }
    return model, tokenizer, found
