"""Output that grows in parts and survives a kill at any byte.

Lines are appended to ``.NAME.partial`` files. After each part the files are synced and ``progress.json`` (written
whole or not at all) records their lengths together with the caller's state. After a kill the files are cut back to
those lengths, so the finished parts stay and the torn one is made again. Memory does not grow with the output.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from neureasoner.artifacts import read_json, write_json

PROGRESS = "progress.json"


class PartFiles:
    """Append-only files of one stage folder that change together.

    Usage::

        with PartFiles(folder, ["references.jsonl", "removed.jsonl"]) as files:
            state = files.state or {"rows": 0}
            files.commit({"references.jsonl": b"..."}, {"rows": 1000})
            files.publish()

    ``state`` is what the last commit recorded; {} before the first.
    """

    def __init__(self, folder: Path, names: Sequence[str]):
        self.folder, self.names = folder, list(names)
        self.state: dict[str, Any] = {}
        self._sizes = dict.fromkeys(self.names, 0)
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> PartFiles:
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / PROGRESS).is_file():
            saved = read_json(self.folder / PROGRESS)
            self.state, self._sizes = saved["state"], {n: saved["sizes"].get(n, 0) for n in self.names}
            if saved["published"]:
                return self
        for name in self.names:
            path = self.partial(name)
            if self._sizes[name] and (not path.is_file() or path.stat().st_size < self._sizes[name]):
                # a file was deleted or the disk lost what it had confirmed: nothing can be trusted
                return self._begin_again()
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def partial(self, name: str) -> Path:
        """Where a file grows until it is published."""
        return self.folder / f".{name}.partial"

    def _begin_again(self) -> PartFiles:
        self.state, self._sizes = {}, dict.fromkeys(self.names, 0)
        (self.folder / PROGRESS).unlink()
        self._open()
        return self

    def _open(self) -> None:
        for name in self.names:
            file = self.partial(name).open("ab")
            file.truncate(self._sizes[name])
            self._files[name] = file

    def commit(self, data: Mapping[str, bytes], state: Mapping[str, Any]) -> None:
        """Append to the files and record ``state``: after this, a kill does not lose them."""
        for name, file in self._files.items():
            file.write(data.get(name, b""))
            file.flush()
            os.fsync(file.fileno())
            self._sizes[name] += len(data.get(name, b""))
        self._record(state, published=False)

    def _record(self, state: Mapping[str, Any], published: bool) -> None:
        self.state = dict(state)
        write_json(self.folder / PROGRESS, {"state": self.state, "sizes": self._sizes, "published": published})

    def publish(self, drop: Sequence[str] = ()) -> None:
        """Give the files their names; ``drop`` those that were needed only meanwhile. A kill in between is harmless."""
        self._record(self.state, published=True)
        self.__exit__()
        for name in self.names:
            path = self.partial(name)
            if name in drop:
                path.unlink(missing_ok=True)
            elif path.is_file():
                os.replace(path, self.folder / name)

    def clear(self) -> None:
        """Forget the progress; only once the stage is marked done."""
        (self.folder / PROGRESS).unlink(missing_ok=True)
