"""What every stage shares: one output folder, finished or not, never half.

A stage is done when its folder holds ``stage.json``, written last. Running it again with the same settings returns at
once; with other settings it is refused, so that results never mix.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neureasoner import __version__
from neureasoner.artifacts import file_fingerprint, fingerprint, read_json, write_json
from neureasoner.errors import UserError

MARK, STARTED = "stage.json", "stage.started.json"


class StageFolder:
    """The output folder of one stage.

    Usage::

        folder = StageFolder(config.out, "data judge", config, inputs=[config.traces])
        if folder.done:
            return folder.summary
        ...
        return folder.finish({"n": 10})
    """

    def __init__(self, out: str | Path, name: str, config: Any, inputs: Sequence[str | Path] = ()):
        self.path, self.name = Path(out), name
        for path in inputs:
            if not Path(path).exists():
                raise UserError(f"{name}: input {path} does not exist; run the stage that writes it first")
        settings = asdict(config)
        settings.pop("out", None)
        self.config = settings
        self.key = fingerprint(name, settings, file_fingerprint([p for p in inputs if Path(p).is_file()]))
        self._begin = time.time()
        mark = self.path / MARK
        self.done = mark.is_file()
        started = mark if self.done else self.path / STARTED
        same = started.is_file() and read_json(started)["key"] == self.key
        if started.is_file() and not same and (self.done or any(p.name != STARTED for p in self.path.iterdir())):
            raise UserError(
                f"{name}: {self.path} holds the output of other settings or inputs; choose another --out or delete it"
            )
        self.summary: dict[str, Any] = read_json(mark)["summary"] if self.done else {}
        if not self.done and not same:
            write_json(self.path / STARTED, {"key": self.key, "name": name, "config": settings})

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Mark the stage done and return its summary."""
        write_json(
            self.path / MARK,
            {
                "key": self.key,
                "name": self.name,
                "config": self.config,
                "version": __version__,
                "seconds": round(time.time() - self._begin, 1),
                "summary": summary,
            },
        )
        (self.path / STARTED).unlink(missing_ok=True)
        self.summary, self.done = summary, True
        return summary
