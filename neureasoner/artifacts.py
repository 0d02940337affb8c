"""Artifact files: safetensors and JSON/YAML only, written whole or not at all.

Every writer goes through a temporary file in the same folder, fsync, and rename, so a reader never meets half a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neureasoner import __version__
from neureasoner.errors import UserError

if TYPE_CHECKING:
    import torch

SCHEMA = 1


def _atomic(path: str | Path, write: Callable[[str], None]) -> None:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; choose a folder you may write to") from None
    os.close(fd)
    try:
        write(tmp)
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(tmp, 0o666 & ~umask)
        os.replace(tmp, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    _atomic(path, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))  # type: ignore[arg-type,return-value]


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write lines (each with its newline) as they come, atomically; memory holds one."""

    def write(tmp: str) -> None:
        with open(tmp, "w", encoding="utf-8") as f:
            f.writelines(lines)

    _atomic(path, write)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises UserError naming the file and line."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path}, line {e.lineno}: not JSON ({e.msg})") from None


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any] | None = None) -> None:
    """Write named tensors as safetensors, atomically; ``meta`` is stored as JSON in the header."""
    from safetensors.torch import save_file

    header = {"meta": json.dumps(meta or {}), "schema": str(SCHEMA), "version": __version__}
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    _atomic(path, lambda tmp: save_file(contiguous, tmp, metadata=header))


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what ``write_tensors`` wrote. Raises UserError for a missing, damaged or newer file."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as f:
            header = f.metadata() or {}
            if int(header.get("schema", SCHEMA)) > SCHEMA:
                raise UserError(f"{path}: written by a newer version ({header.get('version')}); update neureasoner")
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads(header.get("meta", "{}"))  # noqa: SIM118
    except SafetensorError as e:
        raise UserError(f"{path}: not a safetensors file ({e})") from None


def fingerprint(*parts: Any) -> str:
    """Short content hash of JSON-able values (files: pass their bytes)."""
    h = hashlib.sha256()
    for p in parts:
        h.update(p if isinstance(p, bytes) else json.dumps(p, sort_keys=True, default=str).encode())
        h.update(b"\0")
    return h.hexdigest()[:16]


def file_fingerprint(paths: Iterable[str | Path]) -> str:
    """Content hash of files, in the order given; they are read in pieces. Equals ``fingerprint`` of their bytes."""
    h = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as f:
            while piece := f.read(1 << 20):
                h.update(piece)
        h.update(b"\0")
    return h.hexdigest()[:16]
