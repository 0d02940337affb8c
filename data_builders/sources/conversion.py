"""Raw rows -> what they add to the output files. One part of the input in memory at a time; no I/O."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from neureasoner.data_builders.sources.config import ImportConfig
from neureasoner.data_builders.sources.formats import Format, text_of
from neureasoner.data_builders.sources.ids import IdSet, in_shard, in_share
from neureasoner.data_builders.sources.readers import RawRow
from neureasoner.data_builders.sources.rows import SourceRow, Unreadable
from neureasoner.data_builders.sources.selection import Removal, Selector
from neureasoner.data_builders.sources.statistics import Spread

REFERENCES, REMOVED, SET_ASIDE, IDS = "references.jsonl", "removed.jsonl", "set_aside.jsonl", "ids"
PART_ROWS, PART_BYTES = 1000, 32 << 20  # a part ends at either
SHOWN = 20  # removals by a benchmark that are printed; the file has them all


class Importer:
    """Turns raw rows into parts of the output. Holds one part in memory."""

    def __init__(self, config: ImportConfig, label: str, form: Format, selector: Selector, tokenizer: Any = None):
        self.config, self.label, self.form = config, label, form
        self.selector, self.tokenizer = selector, tokenizer
        self.shard = config.shard_of
        self.counts: Counter[str] = Counter()
        self.spreads = {k: Spread() for k in ("steps", "characters", "tokens")}
        self.seen = IdSet()  # ids that rows brought with them
        self.shown = 0

    def state(self) -> dict[str, Any]:
        """Everything but ``seen``, as JSON."""
        return {"counts": dict(self.counts), "spreads": {k: s.state() for k, s in self.spreads.items()}}

    def restore(self, state: dict[str, Any], ids: bytes) -> None:
        """Go on from a recorded state."""
        self.counts = Counter(state["counts"])
        self.spreads = {k: Spread(s) for k, s in state["spreads"].items()}
        self.seen = IdSet(ids)

    def part(self, raws: Sequence[RawRow]) -> dict[str, bytes]:
        """What a part of the input adds to each output file."""
        rows, aside, new_ids = list[SourceRow](), list[dict[str, Any]](), list[bytes]()
        for raw in raws:
            own = self.form.row_id(raw.value) if raw.value is not None else ""
            row_id = own or f"{self.label}-{raw.number}"
            if not (in_shard(row_id, *self.shard) and in_share(row_id, self.config.share, self.config.seed)):
                continue
            self.counts["read"] += 1
            try:
                if raw.value is None:
                    raise Unreadable(raw.problem)
                if own:
                    new = self.seen.add(own)
                    if new is None:
                        raise Unreadable("an id that came before")
                    new_ids.append(new)
                rows.append(self._row(row_id, raw, raw.value))
            except Unreadable as e:
                self.counts[f"set_aside: {e}"] += 1
                aside.append({"file": raw.file, "line": raw.line, "reason": str(e)})
        kept, removed = self.selector.select(rows)
        self._count(rows, kept, removed)
        return {
            REFERENCES: b"".join(row.line() for row in kept),
            REMOVED: _lines([r.record() for r in removed]),
            SET_ASIDE: _lines(aside),
            IDS: b"".join(new_ids),
        }

    def _row(self, row_id: str, raw: RawRow, value: dict[str, Any]) -> SourceRow:
        text_of(row_id)  # an id that is no valid text cannot be written
        parsed = self.form.read(value)
        kept = {k: _jsonable(value[k]) for k in self.config.keep if k in value}
        meta = {"file": raw.file, "line": raw.line, **parsed.meta, **({"columns": kept} if kept else {})}
        thought = parsed.thought
        return SourceRow(
            row_id, parsed.question, thought.thinking, thought.solution, parsed.answer, self.label,
            thought.closed, thought.finished, meta,
        )  # fmt: skip

    def _count(self, rows: Sequence[SourceRow], kept: Sequence[SourceRow], removed: Sequence[Removal]) -> None:
        counts = self.counts
        counts["kept"] += len(kept)
        for row in rows:
            counts["unfinished"] += not row.finished
            counts["gold"] += row.answer is not None
            if "verdict" in row.meta:
                counts[f"verdict: {row.meta['verdict']}"] += 1
        for r in removed:
            counts[f"removed: {r.reason}"] += 1
            if r.reason == "benchmark":
                counts[f"benchmark: {r.detail['benchmark_item'].split('/')[0]}"] += 1
                counts[f"match: {r.detail['match']}"] += 1
                self._show(r)
        self.spreads["steps"].add([len(row.paragraphs) for row in kept])
        self.spreads["characters"].add([len(row.response) for row in kept])
        if self.tokenizer is not None and kept:
            ids = self.tokenizer([row.response for row in kept], add_special_tokens=False)["input_ids"]
            self.spreads["tokens"].add([len(i) for i in ids])

    def _show(self, removal: Removal) -> None:
        if self.shown < SHOWN:
            d = removal.detail
            words = f"'{d['words']}'" if "words" in d else f"(private, hash {d['hash']})"
            print(f"removed {removal.row.id}: {d['match']} match with {d['benchmark_item']} {words}")
        elif self.shown == SHOWN:
            print(f"… the rest is in {REMOVED}")
        self.shown += 1

    def summary(self) -> dict[str, Any]:
        """summary.json: how many rows went where, and why."""

        def group(name: str) -> dict[str, int]:
            found = {k.split(": ", 1)[1]: v for k, v in self.counts.items() if k.startswith(f"{name}: ")}
            return dict(sorted(found.items(), key=lambda kv: (-kv[1], kv[0])))

        aside, removed = group("set_aside"), group("removed")
        return {
            "read": self.counts["read"],
            "kept": self.counts["kept"],
            "removed": sum(removed.values()),
            "set_aside": sum(aside.values()),
            "removed_reasons": removed,
            "set_aside_reasons": aside,
            "benchmarks": group("benchmark"),
            "benchmark_matches": group("match"),
            "unfinished": self.counts["unfinished"],
            "with_gold": self.counts["gold"],
            "verdicts": group("verdict"),
            "format": {"kind": self.form.kind, "columns": dict(self.form.names)},
            **{k: s.summary() for k, s in self.spreads.items() if s.n},
        }


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _lines(records: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode("utf-8", "replace")


def _size(value: Any) -> int:
    """Characters of the texts in a value; what else it holds is small beside them."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def parts(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """Rows in parts of bounded size; where a part ends depends on the rows alone."""
    part: list[RawRow] = []
    size = 0
    for row in rows:
        part.append(row)
        size += _size(row.value)
        if len(part) >= PART_ROWS or size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
