"""Which folder a model's name means, and which files tell one model from another. Light: imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from neureasoner.errors import UserError

ASSETS = Path(__file__).parent / "assets"
# The tiny reasoner, and what `neureasoner run full` made of it: fine-tuned on triggers, with probes and a plan.
SHIPPED = {name: ASSETS / name for name in ("tiny", "tiny-steered")}
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIG = 1 << 28  # bytes; larger files are told apart by the fingerprint of the loaded weights


PICKLED = "pickled weights, which can run code; save them as safetensors (save_pretrained)"
OTHER_WEIGHTS = {
    "*.gguf": "a GGUF file, which is for llama.cpp; take the model it was made from, as safetensors",
    "pytorch_model*.bin*": PICKLED,
    "*.pt*": PICKLED,
    "*.safetensors": "weights under another name; call one file model.safetensors, several need their index",
}


def adapter(folder: Path) -> str:
    """What to do with a folder that holds a LoRA adapter instead of a model; empty if it does not."""
    if not (folder / "adapter_config.json").is_file():
        return ""
    return (
        "is a LoRA adapter without its base; put it into the base first: "
        f"`neureasoner training merge --adapter {folder} --out FOLDER`"
    )


def instead_of_weights(folder: Path) -> str:
    """What a folder without ``model.safetensors`` holds instead, and what to do; empty if nothing is known."""
    if (folder / WHOLE).is_file() or (folder / INDEX).is_file():
        return ""
    for pattern, what in OTHER_WEIGHTS.items():
        found = sorted(folder.glob(pattern))
        if found:
            return f"holds no model.safetensors but {found[0].name}, {what}"
    return ""


def refuse_no_file(path: Path) -> None:
    """Raises UserError for a name that is there but is no file: a folder, or (in a hub's cache) a link to nothing."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path}: is no file but a folder or a link to nothing; download or copy it again")


def resolve(name: str) -> str:
    """Folder or hub id behind ``name``; ``tiny`` and ``tiny-steered`` are shipped.

    Raises UserError if these are not packaged, or for a path that is no model folder.
    """
    if name in SHIPPED:
        if not (SHIPPED[name] / "config.json").is_file():
            raise UserError(f"the shipped model '{name}' is not in this installation; name a model folder instead")
        return str(SHIPPED[name])
    path = Path(name).expanduser()
    if path.is_dir():
        refuse_no_file(path / "config.json")
        if not (path / "config.json").is_file():
            hint = adapter(path) or instead_of_weights(path)
            raise UserError(
                f"{name}: holds no config.json, so it is not a model folder" + (f"; it {hint}" if hint else "")
            )
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such model folder")
    return name


def model_files(name: str) -> list[Path]:
    """Configuration, tokenizer and (up to 256 MB) weight files of a model; empty for a hub id.

    Stages hash them, so that other weights under the same name are other inputs.
    """
    folder = Path(resolve(name))
    if not folder.is_dir():
        return []
    names = ("config.json", "tokenizer.json")
    files = [folder / n for n in names if (folder / n).is_file()] + sorted(folder.glob("*.safetensors"))
    return [f for f in files if f.stat().st_size < BIG]
