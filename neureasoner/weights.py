"""Is a model folder whole, plain and loadable? Told from its small files and the headers of its weight files.

Nothing here reads weights or imports torch, so a folder that cannot work is refused before minutes are spent on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json
from neureasoner.errors import UserError
from neureasoner.model_files import INDEX, WHOLE, adapter, instead_of_weights, refuse_no_file
from neureasoner.sites import refuse_quantised

POINTER = b"version https://git-lfs.github.com/spec/"
GENERATION = "generation_config.json"
CONFIGS = ("config.json", GENERATION, INDEX)
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
READ = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")  # files that loading may open
FLOATS = ("F64", "F32", "F16", "BF16")
PACKED = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "absmax", "SCB", "W_q")
NOTHING = f"holds no weights ({WHOLE}); download or save the model again"
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's weights; empty where there is none. Raises UserError for a bad index."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        return []
    places = _object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(p, str) for p in places.values()):
        raise UserError(f"{folder / INDEX}: names no files (weight_map); download or save the model again")
    return [folder / name for name in sorted(set(places.values()))]


def check_weights(folder: Path) -> None:
    """Raises UserError for weights that are an adapter's, missing, pickled, cut short or quantised."""
    if adapter(folder):
        raise UserError(f"{folder} {adapter(folder)}")
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder} cannot be loaded: it {instead_of_weights(folder) or NOTHING}")
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {INDEX} names {missing[0]}, which is not there ({len(missing)} of {len(files)} files are "
            "missing); download or copy them again"
        )
    for file in files:
        _check_plain(folder, check_file(file))


def check_texts(folder: Path, names: tuple[str, ...]) -> None:
    """Raises UserError for what is no file, one that git-lfs left as a pointer, and one of ``names`` without a JSON
    object."""
    for file in sorted(f for f in folder.iterdir() if f.suffix in READ):
        refuse_no_file(file)
        if _start(file, len(POINTER)) == POINTER:
            raise UserError(
                f"{file}: is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or download it"
            )
    for name in names:
        if (folder / name).is_file():
            _object(folder / name)


def check_file(file: Path) -> Mapping[str, Any]:
    """The header of a safetensors file: name -> dtype, shape, offsets. Raises UserError for one that is not whole."""
    size = file.stat().st_size
    length = int.from_bytes(_start(file, 8), "little")
    if size < 8 or not 2 <= length <= HEADER_LIMIT:
        raise UserError(f"{file} cannot be read: not a safetensors file ({size} bytes); download or copy it again")
    header, needed = {}, 8 + length
    if size >= needed:
        try:
            header = json.loads(_start(file, needed)[8:])
            header.pop("__metadata__", None)
            needed += max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            raise UserError(f"{file} cannot be read: its header is damaged; download or copy it again") from None
    if size != needed:
        what = f"cut short ({size} of {needed}" if size < needed else f"not whole ({size} instead of {needed}"
        raise UserError(f"{file} cannot be read: {what} bytes); download or copy it again")
    return header


def _check_plain(folder: Path, header: Mapping[str, Any]) -> None:
    for name, entry in header.items():
        leaf = name.rpartition(".")[2]
        if leaf in PACKED or (leaf == "weight" and entry.get("dtype") not in FLOATS):
            refuse_quantised(str(folder), f"{name} is {entry.get('dtype')}")


def _object(file: Path) -> dict[str, Any]:
    if not file.stat().st_size:
        raise UserError(f"{file}: is empty; download or copy it again")
    try:
        value = read_json(file)
    except UnicodeDecodeError:
        raise UserError(f"{file}: not text; download or copy it again") from None
    except UserError as e:
        raise UserError(f"{e}; download or copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds no JSON object; download or copy it again")
    return value


def _start(file: Path, n: int) -> bytes:
    try:
        with file.open("rb") as f:
            return f.read(n)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None
