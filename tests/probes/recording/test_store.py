"""The store: what is read is what was appended, row by row and in little memory; a kill leaves a prefix (promise 9)."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from neureasoner import artifacts
from neureasoner.errors import UserError
from neureasoner.probes.recording.store import SeriesStore

SITES = {"neuron:1[3,0,7]": 3, "logits": 2}
LENGTHS = [5, 0, 17, 1, 9, 30, 2, 8]
PRINTS = {"model_fingerprint": "m", "tokenizer_fingerprint": "t"}
FORK = multiprocessing.get_context("fork")


def make(folder, dtype="float32", sites=SITES, **prints):
    return SeriesStore.create(folder, sites, dtype=dtype, **(PRINTS | prints))


def series_of(i, length=None):
    """A trace's series, told by its number, so that no other process has to say what it wrote."""
    rng = np.random.default_rng(i)
    length = LENGTHS[i % len(LENGTHS)] if length is None else length
    return {site: rng.standard_normal((length, c)).astype(np.float32) for site, c in SITES.items()}


def items_of(*numbers):
    return [(f"t{i}", series_of(i)) for i in numbers]


@pytest.fixture
def filled(tmp_path):
    """Eight traces in three shards, the middle one a single empty trace."""
    store = make(tmp_path / "s")
    for numbers in ([0], [1], range(2, 8)):
        store.append(items_of(*numbers), [f"key{i}" for i in numbers])
    return store


def test_what_is_read_is_what_was_appended(filled):
    for store in (filled, SeriesStore(filled.folder), make(filled.folder)):
        assert list(store) == [f"t{i}" for i in range(8)] and len(store) == 8 and "t3" in store and "t8" not in store
        assert store.sites == SITES and store.dtype == "float32" and store.n_tokens == sum(LENGTHS)
        assert (store.model_fingerprint, store.tokenizer_fingerprint) == ("m", "t")
        for i in range(8):
            assert store.length(f"t{i}") == LENGTHS[i] and store.key(f"t{i}") == f"key{i}"
            got, want = store[f"t{i}"], series_of(i)
            assert list(got) == list(SITES)
            for site in SITES:
                assert got[site].dtype == np.float32
                np.testing.assert_array_equal(got[site], want[site])


def test_sites_and_channels(filled):
    [(site, value)] = filled.series("t2", ["neuron:1[3, 0, 7]"], channels=[2, 0]).items()
    assert site == "neuron:1[3,0,7]"
    np.testing.assert_array_equal(value, series_of(2)[site][:, [2, 0]])
    both = filled.series("t2", channels=[1])
    assert {s: v.shape for s, v in both.items()} == {s: (17, 1) for s in SITES}
    value += 1  # the caller's own: neither the file nor the next reader sees it
    np.testing.assert_array_equal(filled["t2"][site], series_of(2)[site])


def test_tokens_in_order_across_shards(filled):
    for site in SITES:
        whole = np.concatenate([series_of(i)[site] for i in range(8)])
        n = len(whole)
        np.testing.assert_array_equal(filled.rows(site), whole)
        for start, stop in [(0, 0), (0, 5), (4, 6), (5, 5), (3, 40), (n - 1, n), (n, n), (7, None)]:
            np.testing.assert_array_equal(filled.rows(site, start, stop), whole[start:stop])
        for size in (1, 7, n, 1000):
            chunks = list(filled.chunks(site, size))
            assert [len(c) for c in chunks[:-1]] == [size] * (len(chunks) - 1) and 0 < len(chunks[-1]) <= size
            np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_an_empty_store(tmp_path):
    store = make(tmp_path / "s")
    store.append([])
    assert (len(store), store.n_tokens, list(store.chunks("logits"))) == (0, 0, [])
    assert store.rows("logits").shape == (0, 2) and not list((tmp_path / "s").glob("*.safetensors"))


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 8)])
def test_narrow_stores_round_once(tmp_path, dtype, digits):
    make(tmp_path / "s", dtype).append(items_of(2))
    got, want = SeriesStore(tmp_path / "s")["t2"]["logits"], series_of(2)["logits"].astype(np.float64)
    ulp = 2.0 ** (np.floor(np.log2(np.abs(want))) + 1 - digits)
    assert got.dtype == np.float32 and (np.abs(got - want) <= ulp / 2).all() and (got != want).any()
    file = safetensors.torch.load_file(tmp_path / "s" / "00000.safetensors")["logits"]
    assert file.dtype == getattr(torch, dtype) and file.shape == (17, 2)


def test_a_value_that_does_not_fit_is_named(tmp_path):
    store, items = make(tmp_path / "s", "float16"), items_of(0, 2)
    items[1][1]["logits"][4, 1] = -70000
    with pytest.raises(UserError, match=r"site 'logits', trace 't2', token 4, channel 1: -70000 does not fit float16"):
        store.append(items)
    assert not len(store) and not len(SeriesStore(tmp_path / "s"))
    make(tmp_path / "b", "bfloat16").append(items)


def test_a_site_is_one_tensor_a_shard_and_appends_leave_the_others_alone(filled):
    names = [f"{i:05d}.safetensors" for i in range(3)]
    files = sorted(p for p in filled.folder.iterdir() if p.name != ".lock")
    assert [p.name for p in files] == [*names, "index.json"]
    before = [p.stat().st_mtime_ns for p in files]
    filled.append(items_of(8))
    assert [p.stat().st_mtime_ns for p in files] == before
    last = safetensors.torch.load_file(filled.folder / names[2])
    assert {k: tuple(v.shape) for k, v in last.items()} == {s: (sum(LENGTHS[2:]), c) for s, c in SITES.items()}


def test_errors_of_reading_are_named(filled):
    for message, call in {
        r"no trace 't9'; there are 8 \(t0, t1, t2, …\)": lambda: filled["t9"],
        r"no trace 'x'": lambda: filled.length("x"),
        r"site 'residual:0' was not recorded; there are neuron:1\[3,0,7\], logits": lambda: filled.rows("residual:0"),
        r"site 'neuron:1\[3\]' was not recorded": lambda: filled.series("t0", ["logits", "neuron:1[3]"]),
        r"site 'what' is unknown": lambda: filled.series("t0", ["what"]),
        r"site 'logits': channel 2 is out of range; it has channels 0 to 1": lambda: filled.series("t0", None, [1, 2]),
        r"site 'logits': channel -1 is out of range": lambda: filled.series("t0", ["logits"], [-1]),
        r"rows 70 to 73 are out of range; there are 72": lambda: filled.rows("logits", 70, 73),
        r"rows 5 to 4 are out of range": lambda: filled.rows("logits", 5, 4),
    }.items():
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(UserError, match=r"index\.json: no such file"):
        SeriesStore(filled.folder.parent)


def test_errors_of_appending_are_named_and_change_nothing(filled):
    good = series_of(8, 4)
    short = {**good, "logits": good["logits"][:3]}
    wide = {**good, "logits": np.zeros((4, 3), np.float32)}
    for message, items in {
        r"trace 't3' is in the store already": [("t8", good), ("t3", good)],
        r"a trace id occurs twice in one append": [("t8", good), ("t8", good)],
        r"trace 't8' brings sites \['logits'\], the store holds \['neuron:1\[3,0,7\]', 'logits'\]; record it": [
            ("t8", {"logits": good["logits"]})
        ],
        r"trace 't8' brings sites": [("t8", {**good, "residual:0": good["logits"]})],
        r"trace 't8', site 'neuron:1\[3,0,7\]' has shape \[4, 3\], expected \[3, 3\]": [("t8", short)],
        r"trace 't8', site 'logits' has shape \[4, 3\], expected \[4, 2\]": [("t8", wide)],
    }.items():
        with pytest.raises(UserError, match=message):
            filled.append(items)
    for message, other in {
        r"was recorded with model fingerprint m, not n; choose another folder or delete it": {"model_fingerprint": "n"},
        r"was recorded with tokenizer fingerprint t, not u": {"tokenizer_fingerprint": "u"},
        r"was recorded with dtype float32, not float16": {"dtype": "float16"},
        r"was recorded with sites .* not \{'logits': 2\}": {"sites": {"logits": 2}},
        r"dtype 'float8' is unknown; use one of float32, float16, bfloat16": {"dtype": "float8"},
    }.items():
        with pytest.raises(UserError, match=message):
            make(filled.folder, **other)
    assert list(SeriesStore(filled.folder)) == [f"t{i}" for i in range(8)]


def test_a_damaged_shard_is_named_and_can_be_recorded_again(filled):
    path = filled.folder / "00000.safetensors"
    whole = path.read_bytes()
    lie = safetensors.torch.save(
        {"logits": torch.zeros(5, 2)}, json.loads(whole[8 : 8 + whole[0] + 256 * whole[1]])["__metadata__"]
    )
    for content in (b"", b"nonsense" * 20, whole[:-1], whole[: len(whole) // 2], safetensors.torch.save({}), lie):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"00000\.safetensors: damaged \(.+\); delete this file and record again"):
            SeriesStore(filled.folder)
    with pytest.raises(UserError, match=r"00000\.safetensors: damaged"):  # opened while it was whole
        filled["t0"]
    path.unlink()
    store = make(filled.folder)
    assert list(store) == [f"t{i}" for i in range(1, 8)]
    store.append(items_of(0))
    assert (filled.folder / "00003.safetensors").is_file()
    np.testing.assert_array_equal(SeriesStore(filled.folder)["t0"]["logits"], series_of(0)["logits"])


def test_files_that_do_not_belong_are_named(filled, tmp_path):
    other = make(tmp_path / "o", model_fingerprint="n")
    other.append(items_of(9))
    foreign = filled.folder / "00007.safetensors"
    foreign.write_bytes((tmp_path / "o" / "00000.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"00007\.safetensors: belongs to another store"):
        SeriesStore(filled.folder)
    foreign.write_bytes((filled.folder / "00002.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"00007\.safetensors: trace 't2' is in 00002\.safetensors too; delete one"):
        SeriesStore(filled.folder)
    index = tmp_path / "o" / "index.json"
    index.write_text(index.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(UserError, match="written by a newer version"):
        SeriesStore(tmp_path / "o")
    index.write_text("[]")
    with pytest.raises(UserError, match=r"index\.json: not the index of a store"):
        SeriesStore(tmp_path / "o")
    index.unlink()
    with pytest.raises(UserError, match=r"holds safetensors files but no index\.json"):
        make(tmp_path / "o")
    with pytest.raises(UserError, match="choose a folder you may write to"):
        make(filled.folder / "index.json")


def append_until_killed(folder):
    """Two traces an append, from where the store ends; it has no end of its own, so a kill always finds it at work."""
    store = make(folder)
    for i in itertools.count(len(store), 2):
        store.append([(f"t{j}", series_of(j, 200 + j)) for j in (i, i + 1)])


def test_promise_9_killed_at_random_it_holds_a_prefix_and_goes_on(tmp_path):
    folder, rng, seen, kills = tmp_path / "s", np.random.default_rng(0), 0, 0
    while kills < 8 or seen < 20:
        process = FORK.Process(target=append_until_killed, args=(folder,))
        process.start()
        process.join(rng.uniform(0.0, 0.06))
        assert process.is_alive()
        process.kill()
        process.join()
        kills += 1
        if (folder / "index.json").is_file():
            store = SeriesStore(folder)
            names, seen = list(store), max(seen, len(store))
            assert names == [f"t{i}" for i in range(len(names))] and len(names) == seen and seen % 2 == 0
            for i in range(max(0, seen - 4), seen):
                np.testing.assert_array_equal(store[f"t{i}"]["logits"], series_of(i, 200 + i)["logits"])
    whole = np.concatenate([series_of(i, 200 + i)["logits"] for i in range(seen)])
    np.testing.assert_array_equal(make(folder).rows("logits"), whole)
    assert not list(folder.glob(".*.tmp")), "what the kills left behind is gone"


@pytest.mark.parametrize(("moment", "there"), [("half", 2), ("before", 2), ("after", 3)])
def test_promise_9_killed_at_every_moment_of_an_append(tmp_path, moment, there):
    folder = tmp_path / "s"
    make(folder).append(items_of(0, 2))

    def dies():
        def half(tensors, path, metadata):
            data = safetensors.torch.save(tensors, metadata)
            with open(path, "wb") as f:
                f.write(data[: len(data) // 2])
            os._exit(9)

        replace = os.replace
        if moment == "half":
            safetensors.torch.save_file = half
        else:
            artifacts.os.replace = lambda a, b: (moment == "after" and replace(a, b), os._exit(9))
        make(folder).append(items_of(4))

    process = FORK.Process(target=dies)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert list(SeriesStore(folder)) == ["t0", "t2", "t4"][:there]
    assert bool(list(folder.glob(".*.tmp"))) == (moment != "after")
    store = make(folder)
    assert not list(folder.glob(".*.tmp"))
    store.append(items_of(*[4, 5][there - 2 :]))
    np.testing.assert_array_equal(SeriesStore(folder)["t4"]["logits"], series_of(4)["logits"])


def append_every_third(folder, begin):
    store = make(folder)
    for i in range(begin, 30, 3):
        store.append(items_of(i))


def test_processes_that_share_a_store_lose_nothing(tmp_path):
    folder = tmp_path / "s"
    processes = [FORK.Process(target=append_every_third, args=(folder, b)) for b in range(3)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
        assert p.exitcode == 0
    store = SeriesStore(folder)
    assert set(store) == {f"t{i}" for i in range(30)}
    for i in range(30):
        np.testing.assert_array_equal(store[f"t{i}"]["logits"], series_of(i)["logits"])


def test_another_process_appending_the_same_trace_is_an_error(tmp_path):
    one, two = make(tmp_path / "s"), make(tmp_path / "s")
    one.append(items_of(0))
    with pytest.raises(UserError, match="trace 't0' is in the store already"):
        two.append(items_of(0))
    assert "t0" in two, "it knows now"


# Row r, channel c of the large store holds (64 r + c) mod 1009: exact in float16, and its sum is whole numbers.
WRITE = """
def block(begin, end):
    return ((64 * np.arange(begin, end)[:, None] + np.arange(64)) % 1009).astype(np.float32)
"""
READ = """
import re, sys
from pathlib import Path
import numpy as np
from neureasoner.probes.recording.store import SeriesStore
{write}
folder, length, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
store = SeriesStore(folder)
picked = np.random.default_rng(0).integers(0, len(store), 200)
store.series("0")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
for i in picked:
    assert (store.series(str(i))["residual:0"] == block(i * length, (i + 1) * length)).all()
total = np.zeros(64)
for chunk in store.chunks("residual:0", size):
    total += chunk.sum(0, dtype=np.float64)
print(peak() - before, *(total / store.n_tokens).tolist())
whole = store.rows("residual:0")
print(peak() - before)
"""


def build(folder, tokens, length, shard, dtype):
    namespace = {"np": np}
    exec(WRITE, namespace)
    store = SeriesStore.create(folder, {"residual:0": 64}, dtype=dtype, **PRINTS)
    for begin in range(0, tokens, shard):
        rows = namespace["block"](begin, begin + shard)
        names = range(begin // length, (begin + shard) // length)
        store.append([(str(i), {"residual:0": rows[k * length : (k + 1) * length]}) for k, i in enumerate(names)])


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)


def memory(folder, length, size):
    """(growth of the peak, in bytes; the mean; the growth once all is loaded) in a process of its own."""
    code = READ.format(write=WRITE)
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(length), str(size)], capture_output=True, text=True, check=True
    )
    first, second = run.stdout.splitlines()
    return int(first.split()[0]), np.array([float(x) for x in first.split()[1:]]), int(second)


def expected_mean(tokens):
    """Over whole periods of 1009 every residue comes equally often; the tail is counted."""
    tail = np.array([[(64 * r + c) % 1009 for c in range(64)] for r in range(tokens - tokens % 1009, tokens)])
    return (tokens // 1009 * (1009 * 1008 // 2) + tail.reshape(-1, 64).sum(0)) / tokens


@pytest.mark.slow
@needs_proc
def test_reading_needs_little_memory(tmp_path):
    """25.6 MB in one shard; chunks of 1 MB."""
    build(tmp_path / "s", 100_000, 500, 100_000, "float32")
    grown, mean, loaded = memory(tmp_path / "s", 500, 4096)
    np.testing.assert_allclose(mean, expected_mean(100_000), rtol=1e-12)
    assert grown < 10e6 and loaded > 24e6, (grown, loaded)


@pytest.mark.slow
@needs_proc
def test_ten_million_tokens_are_never_loaded(tmp_path):
    """2.56 GB; chunks of 16 MB."""
    build(tmp_path / "s", 10_000_000, 1000, 250_000, "float32")
    assert sum(p.stat().st_size for p in (tmp_path / "s").glob("*.safetensors")) > 2.56e9
    grown, mean, loaded = memory(tmp_path / "s", 1000, 1 << 16)
    np.testing.assert_allclose(mean, expected_mean(10_000_000), rtol=1e-12)
    assert grown < 100e6 and loaded > 2.5e9, (grown, loaded)
