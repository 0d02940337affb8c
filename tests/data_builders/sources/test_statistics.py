"""Counts in constant memory, against numpy."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from neureasoner.data_builders.sources.ids import IdSet, in_shard, in_share
from neureasoner.data_builders.sources.statistics import Spread


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=60), st.integers(0, 60))
def test_spread(values: list[int], cut: int) -> None:
    spread = Spread()
    spread.add(values[:cut])
    spread = Spread(json.loads(json.dumps(spread.state())))  # a resume in between
    spread.add(values[cut:])
    summary = spread.summary()
    assert (summary["min"], summary["max"], summary["sum"]) == (min(values), max(values), sum(values))
    for p in (0.5, 0.9, 0.99):
        exact = float(np.quantile(values, p, method="inverted_cdf"))
        found = spread.percentile(p)
        assert found is not None and abs(found - exact) <= 0.045 * exact + 0.5


def test_no_values() -> None:
    assert Spread().summary() == {} and Spread().percentile(0.5) is None


@given(st.text(), st.integers(1, 7))
def test_every_id_lies_in_one_shard(row_id: str, n: int) -> None:
    assert [in_shard(row_id, i, n) for i in range(n)].count(True) == 1


def test_shares_nest_and_have_their_size() -> None:
    ids = [f"row-{i}" for i in range(4000)]
    small, large = ({x for x in ids if in_share(x, s, 3)} for s in (0.1, 0.5))
    assert small < large and abs(len(large) - 2000) < 200 and abs(len(small) - 400) < 100
    assert large != {x for x in ids if in_share(x, 0.5, 4)}


@given(st.lists(st.integers(0, 60).map(str), max_size=120), st.integers(0, 120))
def test_id_set_is_a_set(ids: list[str], cut: int) -> None:
    found, seen, saved = IdSet(), set[str](), b""
    found.RECENT = 7  # type: ignore[misc]
    for i, row_id in enumerate(ids):
        if i == cut:
            found = IdSet(saved)
        new = found.add(row_id)
        assert (new is not None) == (row_id not in seen)
        seen.add(row_id)
        saved += new or b""
