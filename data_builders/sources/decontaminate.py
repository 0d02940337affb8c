"""Decontamination: does a text hold a question of a benchmark? (core.md §1.8: exact match plus 13-gram overlap)

Three ways to match, on normalised text (``normalise.py``):

- ``exact``: the whole question equals a benchmark's, operators included;
- ``ngram``: thirteen words in a row are also in a benchmark's question;
- ``contained``: a benchmark question of 8 to 12 words stands in the text whole, operators included.

The index holds hashes only, so it may be passed on where the benchmark itself may not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.artifacts import read_tensors, write_tensors
from neureasoner.data_builders.sources.ngrams import Table, Windows, text_hash, word_hashes
from neureasoner.data_builders.sources.normalise import bare_question, is_word, tokens
from neureasoner.errors import UserError

NGRAM = 13
SHORTEST = 8
SHOWN = 20  # words of a whole question that a report quotes


@dataclass(frozen=True)
class Match:
    """Why a text was found in a benchmark. ``words``: what both share; for a private benchmark only their hash."""

    kind: str
    item: str
    words: str
    private: bool

    def __str__(self) -> str:
        return f"{self.kind} match with {self.item}: {self.words}"


@dataclass(frozen=True)
class Item:
    """One benchmark question, ready to be indexed."""

    name: str
    question: str
    private: bool = False


class BenchmarkIndex:
    """Hashes of benchmark questions.

    Usage::

        index = BenchmarkIndex.build([Item("amc23/0", "Cities A and B are 45 miles apart. ...")])
        match = index.match(question)

    Attributes: ``names`` of the items; ``private`` [items]; ``exact`` Table of whole questions; ``windows`` Table per
    window length: 13 for n-grams, 8 to 12 for the questions of that many words.
    """

    def __init__(
        self, names: list[str], private: np.ndarray, exact: Table, windows: dict[int, Table], whole: np.ndarray
    ):
        self.names, self.private, self.exact, self.windows = names, private, exact, windows
        self.whole = whole  # [items] hash of each whole question, to confirm a containment

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def build(cls, items: Iterable[Item]) -> BenchmarkIndex:
        """Index questions. Those without a word are left out."""
        names, private, whole = list[str](), list[bool](), list[int]()
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        for item in items:
            toks = _trim(tokens(bare_question(item.question)))
            words = [t for t in toks if is_word(t)]
            if not words:
                continue
            place = len(names)
            names.append(item.name)
            private.append(item.private)
            whole.append(text_hash(" ".join(toks)))
            if len(words) >= SHORTEST:
                n = min(len(words), NGRAM)
                found.setdefault(n, []).append((Windows(word_hashes(words)).of(n), place))
        hashes = np.array(whole, np.uint64)
        exact = Table(hashes, np.arange(len(names), dtype=np.int32))
        windows = {
            n: Table(
                np.concatenate([h for h, _ in rows]), np.concatenate([np.full(len(h), i, np.int32) for h, i in rows])
            )
            for n, rows in sorted(found.items())
        }
        return cls(names, np.array(private, bool), exact, windows, hashes)

    def match(self, text: str, whole: bool = True) -> Match | None:
        """The first overlap of a text, or None. ``whole=False``: do not ask whether the text is the question."""
        toks = _trim(tokens(bare_question(text)))
        places = [i for i, t in enumerate(toks) if is_word(t)]
        words = [toks[i] for i in places]
        if whole and words:
            entry = int(self.exact.find(np.array([text_hash(" ".join(toks))], np.uint64))[0])
            if entry >= 0:
                return self._match("exact", int(self.exact.items[entry]), words)
        if len(words) < SHORTEST:
            return None
        windows = Windows(word_hashes(words))
        for n in sorted(self.windows, reverse=True):
            table = self.windows[n]
            entries = table.find(windows.of(n))
            for start in np.flatnonzero(entries >= 0).tolist():
                item = int(table.items[entries[start]])
                if n == NGRAM:
                    return self._match("ngram", item, words[start : start + n])
                shared = toks[places[start] : places[start + n - 1] + 1]
                entry = int(self.exact.find(np.array([text_hash(" ".join(shared))], np.uint64))[0])
                if entry >= 0:  # words alone do not tell 3 + 4 from 3 - 4
                    return self._match("contained", int(self.exact.items[entry]), words[start : start + n])
        return None

    def _match(self, kind: str, item: int, words: Sequence[str]) -> Match:
        private, text = bool(self.private[item]), " ".join(words[:SHOWN]) + (" …" if len(words) > SHOWN else "")
        return Match(kind, self.names[item], f"hash {text_hash(text):016x}" if private else text, private)

    def save(self, path: str | Path) -> None:
        """Write the index as safetensors: hashes and item names, no question."""
        import torch

        arrays: dict[str, Any] = {"private": self.private.astype(np.int8), "whole": self.whole}
        for n, table in self.windows.items():
            arrays[f"hashes.{n}"], arrays[f"items.{n}"] = table.hashes, table.items
        # signed, because not every reader of safetensors knows unsigned 64-bit numbers
        signed = {k: torch.from_numpy(a.view(np.int64) if a.dtype == np.uint64 else a) for k, a in arrays.items()}
        write_tensors(path, signed, {"kind": "benchmark index", "ngram": NGRAM, "names": self.names})

    @classmethod
    def load(cls, path: str | Path) -> BenchmarkIndex:
        """Read what ``save`` wrote. Raises UserError for another kind of file."""
        tensors, meta = read_tensors(path)
        if meta.get("kind") != "benchmark index" or meta.get("ngram") != NGRAM or "whole" not in tensors:
            raise UserError(f"{path}: not a benchmark index of {NGRAM}-grams; build it again")
        arrays = {k: t.numpy() for k, t in tensors.items()}
        whole = arrays["whole"].view(np.uint64)
        windows = {
            int(k.split(".")[1]): Table(a.view(np.uint64), arrays[k.replace("hashes", "items")])
            for k, a in arrays.items()
            if k.startswith("hashes.")
        }
        exact = Table(whole, np.arange(len(whole), dtype=np.int32))
        if len(meta["names"]) != len(whole) or any(len(t) and t.items.max() >= len(whole) for t in windows.values()):
            raise UserError(f"{path}: a damaged benchmark index; build it again")
        return cls(list(meta["names"]), arrays["private"].astype(bool), exact, windows, whole)

    def joined(self, other: BenchmarkIndex) -> BenchmarkIndex:
        """Both indexes as one; where both hold a question, this one's name is reported."""
        shift = len(self)
        windows = dict(self.windows)
        for n, table in other.windows.items():
            mine = windows.get(n)
            hashes, items = table.hashes, (table.items + shift).astype(np.int32)
            if mine is not None:
                hashes, items = np.concatenate([mine.hashes, hashes]), np.concatenate([mine.items, items])
            windows[n] = Table(hashes, items)
        whole = np.concatenate([self.whole, other.whole])
        private = np.concatenate([self.private, other.private])
        exact = Table(whole, np.arange(len(whole), dtype=np.int32))
        return BenchmarkIndex(self.names + other.names, private, exact, windows, whole)


def _trim(toks: list[str]) -> list[str]:
    """Without operators at the ends: an item that begins with a minus is still found inside another text."""
    first = next((i for i, t in enumerate(toks) if is_word(t)), len(toks))
    last = next((i for i in range(len(toks), first, -1) if is_word(toks[i - 1])), first)
    return toks[first:last]
