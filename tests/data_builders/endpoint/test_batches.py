"""Batch mode against the server's batches: everything once, split by size, lost replies found again."""

from __future__ import annotations

import sqlite3

import pytest

from neureasoner.data_builders.endpoint.asker import ask_all
from neureasoner.data_builders.endpoint.batches import run_batches
from neureasoner.data_builders.endpoint.tally import Stopped
from neureasoner.errors import UserError


def submitted(server) -> list[str]:
    return [key for row in server.rows("batch") for key in row["ids"]]


def test_batches_answer_what_ask_then_reads(serve, make_config, ask_for, make_question, tmp_path) -> None:
    server = serve("--batch-delay", "0.2", "--fault", "torn:0.15")
    asked = [*ask_for(40), make_question("x", "[[500]]"), make_question("y", "[[expired:1]]"), *ask_for(3)]
    asked[-1] = make_question("twin", asked[0].request.messages[1].content)
    config = make_config(server, tries=2)
    tally = run_batches(lambda: iter(asked), config, poll=0.05, max_requests=15)
    sizes = [len(r["ids"]) for r in server.rows("batch")]
    assert max(sizes) == 15 and sizes[:3] == [15, 15, 12]
    assert tally.answers == len({r["id"] for r in server.rows("answered")}) == len(server.rows("answered"))
    again = [k for k in submitted(server) if submitted(server).count(k) > 1]
    assert set(again) <= {asked[40].request.key, asked[41].request.key}, "only what failed is submitted again"
    outcomes = list(ask_all(asked, config))
    assert sum(o.value is None for o in outcomes) == 1 and outcomes[40].value is None
    assert {r["digest"] for r in server.rows("call")} <= {
        r["digest"] for r in server.rows("call") if r["fault"] in ("500", "expired")
    }
    usages = [r["usage"] for r in server.rows("answered") if "batch" in r]
    half = sum(u["prompt_tokens"] - 1.5 + 4 * u["completion_tokens"] for u in usages) / 2e6
    assert tally.cost == pytest.approx(half)
    assert not list(tmp_path.glob("*.batches/*"))
    plain = make_config(serve("--fault", "torn:0.15"), ledger=str(tmp_path / "live.sqlite"))
    live = list(ask_all(asked[:40], plain))
    assert [(o.id, o.value, o.problems) for o in outcomes[:40]] == [(o.id, o.value, o.problems) for o in live]


def test_files_are_split_by_size(serve, make_config, ask_for) -> None:
    server = serve()
    run_batches(lambda: ask_for(20), make_config(server), poll=0.05, max_bytes=4000)
    files = server.rows("file")
    assert len(files) > 2 and all(r["size"] <= 4000 for r in files) and sum(r["lines"] for r in files) == 20


def test_a_batch_whose_creation_was_never_confirmed_is_found_by_its_tag(serve, make_config, ask_for) -> None:
    server = serve("--drop-batch")
    tally = run_batches(lambda: ask_for(10), make_config(server), poll=0.05)
    assert tally.answers == 10 and tally.faults["connection"] == 1 and len(server.rows("batch")) == 1


def test_ask_refuses_what_an_open_batch_holds(serve, make_config, ask_for) -> None:
    server = serve("--batch-delay", "3600")
    config = make_config(server)
    with pytest.raises(RuntimeError, match="enough"):
        run_batches(lambda: ask_for(10), config, poll=0.05, progress=_enough)
    with pytest.raises(UserError, match="in a batch that was not collected"):
        list(ask_all(ask_for(12), config))
    assert not set(submitted(server)) & set(server.keys())


def _enough(tally) -> None:
    raise RuntimeError("enough")


def test_max_cost_holds_for_batches(serve, make_config, ask_for) -> None:
    server = serve()
    with pytest.raises(Stopped, match="max_cost"):
        run_batches(lambda: ask_for(500), make_config(server, max_cost=0.01), poll=0.05)
    cost = sum(4 * r["usage"]["completion_tokens"] + r["usage"]["prompt_tokens"] for r in server.rows("answered")) / 2e6
    assert 0.002 < cost <= 0.01


@pytest.mark.parametrize("api", ["responses"])
def test_the_responses_api_in_batches(api, serve, make_config, ask_for) -> None:
    server = serve()
    config = make_config(server, api=api)
    run_batches(lambda: ask_for(5), config, poll=0.05)
    assert all(o.value and not o.paid.output for o in ask_all(ask_for(5), config)) and not server.rows("call")
    with sqlite3.connect(config.ledger) as db:
        assert db.execute("SELECT endpoint, state, requests FROM batches").fetchall() == [
            ("/responses", "collected", 5)
        ]
