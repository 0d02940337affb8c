"""Asking a real server: paid for once, faults survived, fatal ones stop at once. The server's log is the witness."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import pytest

from neureasoner.data_builders.endpoint.asker import ask_all
from neureasoner.data_builders.endpoint.attempts import is_lost
from neureasoner.data_builders.endpoint.ledger import Ledger
from neureasoner.data_builders.endpoint.requests import Message, Question, Request
from neureasoner.data_builders.endpoint.tally import Stopped, Tally
from neureasoner.errors import UserError


def values(outcomes: Any) -> list[Any]:
    return [(o.id, o.value, o.problems, o.keys, o.spent) for o in outcomes]


def test_an_answer_is_asked_for_once_and_a_change_costs_only_what_changed(serve, make_config, ask_for) -> None:
    server = serve()
    config = make_config(server)
    first = values(ask_all(ask_for(20), config))
    assert [v[0] for v in first] == [f"q{i}" for i in range(20)] and all(v[1] for v in first)
    assert values(ask_all(ask_for(20), config)) == first
    assert sorted(server.asked().values()) == [1] * 20
    assert len(values(ask_all(ask_for(21), config))) == 21
    assert len(server.asked()) == 21
    changed = [*ask_for(18), *ask_for(3, text="Is {} wrong?", start=18)]
    assert len(values(ask_all(changed, config))) == 21
    assert sorted(server.asked().values()) == [1] * 24
    assert sum(r["event"] == "answered" for r in server.rows()) == 24


def test_what_a_kill_could_lose_is_bounded_however_slow_the_disk(serve, make_config, ask_for, monkeypatch) -> None:
    """A call counts as under way until its answer is kept: on a slow disk no further calls pile up behind it."""
    server, kept, lost = serve(), [0], []
    put = Ledger.put

    def slowly(self: Ledger, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.03)
        lost.append(len(server.rows("call")) - kept[0])
        put(self, *args, **kwargs)
        kept[0] += 1

    monkeypatch.setattr(Ledger, "put", slowly)
    assert len(list(ask_all(ask_for(60), make_config(server, concurrency=4)))) == 60
    assert max(lost) <= 4


def test_outcomes_come_in_order_and_do_not_depend_on_faults(serve, make_config, ask_for, tmp_path) -> None:
    plain, rough = serve(), serve(
        "--latency", "0.02", "--seed", "3", "--fault", "500:0.08", "--fault", "drop:0.05", "--fault", "torn_body:0.05",
        "--fault", "error_body:0.05", "--fault", "odd_body:0.05", "--fault", "429:0.03", "--fault", "503:0.03",
    )  # fmt: skip
    tally = Tally()
    expected = values(ask_all(ask_for(120), make_config(plain)))
    config = make_config(rough, ledger=str(tmp_path / "rough.sqlite"), tries=12)
    got = values(ask_all(ask_for(120), config, tally=tally, total=120))
    assert got == expected
    assert {"http_500", "connection", "body", "http_429", "http_503"} <= set(tally.faults)
    assert tally.done == 120 and tally.failed == 0 and tally.lost == 0 and tally.answers == 120
    free = values(ask_all(ask_for(120), config, ordered=False))
    assert sorted(free) == sorted(expected)


@pytest.mark.parametrize("kind", ["empty", "refusal", "torn", "enum", "length"])
def test_unusable_answers_are_told_what_was_wrong_and_never_accepted(kind, serve, make_config, make_question) -> None:
    server = serve("--keep-bodies")
    once, always = make_question("a", f"Is it right? [[{kind}:1]]"), make_question("b", f"Is it? [[{kind}]]")
    tally = Tally()
    healed, hopeless = list(ask_all([once, always], make_config(server), tally=tally))
    assert healed.value and len(healed.problems) == 1 and len(healed.keys) == 2
    assert hopeless.value is None and len(hopeless.problems) == 3 and not is_lost(hopeless)
    assert sum(tally.faults.values()) == 4 and tally.failed == 1 and tally.calls == 5
    told = [r["body"]["messages"] for r in server.rows("call") if len(r["body"]["messages"]) == 4]
    assert all(healed.problems[0] in m[-1]["content"] for m in told)
    again = list(ask_all([once, always], make_config(server)))
    assert values(again) == values([healed, hopeless]) and not again[1].paid.output
    assert sum(server.asked().values()) == 5


def test_a_request_that_is_never_answered_is_lost_not_fatal_and_asked_again(serve, make_config, make_question) -> None:
    server = serve()
    config, tally = make_config(server, tries=3), Tally()
    asked = [
        make_question("a"),
        make_question("b", "Is it? [[500]]"),
        make_question("c", "[[context]]"),
        make_question("d"),
    ]
    outcomes = list(ask_all(asked, config, tally=tally))
    assert [bool(o.value) for o in outcomes] == [True, False, False, True]
    assert [is_lost(o) for o in outcomes] == [False, True, True, False] and tally.lost == 2
    assert (
        sum("[[500]]" in asked[1].request.messages[1].content for _ in [0]) and server.keys()[asked[1].request.key] == 3
    )
    assert server.keys()[asked[2].request.key] == 1
    list(ask_all(asked, config))
    assert server.keys()[asked[0].request.key] == 1 and server.keys()[asked[1].request.key] == 6


@pytest.mark.parametrize(
    ("kind", "reason"), [("401", "key is not accepted"), ("403", "may not"), ("404", "base_url"), ("quota", "quota")]
)
def test_what_is_fatal_stops_at_once_with_the_reason_and_keeps_what_came(
    kind, reason, serve, make_config, make_question, ask_for
) -> None:
    server = serve("--latency", "0.05")
    asked = [*ask_for(10), make_question("bad", f"[[{kind}]]"), *ask_for(200, start=10)]
    config = make_config(server, concurrency=4)
    with pytest.raises(UserError, match=reason) as caught:
        list(ask_all(asked, config))
    assert "canary" not in str(caught.value) and not isinstance(caught.value, Stopped)
    calls = len(server.rows("call"))
    assert calls < 25, "no new call after the stop"
    with sqlite3.connect(config.ledger) as db:
        kept = {k for (k,) in db.execute("SELECT key FROM answers")}
        assert db.execute("SELECT count(*) FROM claims").fetchone() == (0,)
    answered = {r["id"].partition("-")[0] for r in server.rows("answered")}
    assert len(kept) >= 10 and answered == kept


def test_an_endpoint_that_is_not_there_ends_the_run(serve, make_config, ask_for) -> None:
    server = serve()
    server.stop()
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"25 requests in a row failed.*connection failed"):
        list(ask_all(ask_for(100), make_config(server, tries=2, backoff=0.0)))
    assert time.monotonic() - begin < 20


def test_an_endpoint_that_wants_a_day_of_quiet_ends_the_run(serve, make_config, make_question) -> None:
    with pytest.raises(UserError, match="1440 minutes"):
        list(ask_all([make_question("a", "[[later]]")], make_config(serve())))


def test_slow_answers_run_out_of_time_and_are_tried_again(serve, make_config, make_question) -> None:
    server, tally = serve("--slow", "5"), Tally()
    (outcome,) = ask_all([make_question("a", "[[slow:1]]")], make_config(server, timeout=0.5), tally=tally)
    assert outcome.value and tally.faults == {"timeout": 1}


@pytest.mark.parametrize("options", [["--no-schema", "named"], ["--no-schema", "silent"]])
def test_a_server_without_schemas_is_asked_in_a_weaker_form_that_is_remembered(
    options, serve, make_config, ask_for
) -> None:
    server = serve(*options, "--no-max-completion", "--keep-bodies")
    outcomes = list(ask_all(ask_for(30), make_config(server, concurrency=2)))
    assert all(o.value for o in outcomes)
    refused = [r for r in server.rows("call") if r["status"] == 400]
    assert 2 <= len(refused) <= 6
    bodies = [r["body"] for r in server.rows("call") if r["status"] == 0]
    assert len(bodies) == 30 and all(b["response_format"] == {"type": "json_object"} for b in bodies)
    assert all(b["max_tokens"] == 100 and "fits this schema" in b["messages"][1]["content"] for b in bodies)


def test_a_server_that_takes_no_form_at_all(serve, make_config, ask_for) -> None:
    server = serve("--no-schema", "named", "--no-json", "--keep-bodies")
    assert all(o.value for o in ask_all(ask_for(5), make_config(server)))
    assert all("response_format" not in r["body"] for r in server.rows("call") if r["status"] == 0)


def test_a_400_that_has_other_reasons_changes_no_form(serve, make_config, ask_for, make_question) -> None:
    server = serve("--keep-bodies")
    outcomes = list(ask_all([*ask_for(3), make_question("x", "[[400]]"), *ask_for(40, start=3)], make_config(server)))
    assert [o.value is None for o in outcomes] == [False] * 3 + [True] + [False] * 40
    forms = [r["body"]["response_format"]["type"] for r in server.rows("call") if not r["fault"]]
    assert forms == ["json_schema"] * 43


def test_the_responses_api(serve, make_config, make_question) -> None:
    server = serve("--keep-bodies")
    config = make_config(server, api="responses", effort="low")
    asked = [make_question("a", config=config), make_question("b", "[[refusal]]"), make_question("c", "[[length:1]]")]
    a, b, c = ask_all(asked, config)
    assert a.value and c.value and b.value is None and a.spent.output > 0 and a.spent.cached_input == 3
    body = server.rows("call")[0]["body"]
    assert body["max_output_tokens"] == 100 and body["reasoning"] == {"effort": "low"} and body["store"] is False
    assert body["text"]["format"]["strict"] is True


def test_max_cost_is_never_exceeded_and_finished_work_is_given_out(serve, make_config, ask_for) -> None:
    server = serve("--latency", "0.05")
    seen, tally = [], Tally()
    config = make_config(server, max_cost=0.01, concurrency=8)
    with pytest.raises(Stopped, match="max_cost") as caught:
        for outcome in ask_all(ask_for(500), config, tally=tally):
            seen.append(outcome)
    cost = sum(
        (u["prompt_tokens"] - 3) * 1.0 + 3 * 0.5 + u["completion_tokens"] * 4.0
        for u in (r["usage"] for r in server.rows("answered"))
    ) / 1e6  # fmt: skip
    assert 0.009 < cost <= 0.01 and cost == pytest.approx(tally.cost)
    assert len(seen) == len(server.rows("answered")) == caught.value.tally.done
    assert [o.id for o in seen] == [f"q{i}" for i in range(len(seen))]
    rest = list(ask_all(ask_for(500)[:200], make_config(server)))
    assert len(rest) == 200 and set(server.asked().values()) == {1}


def test_max_cost_without_a_price_is_refused_before_anything_is_sent(serve, make_config, ask_for) -> None:
    server = serve()
    with pytest.raises(UserError, match="price of 'tiny' is unknown"):
        list(ask_all(ask_for(1), make_config(server, prices="", max_cost=1.0)))
    assert not server.rows()


def test_text_that_cannot_be_encoded_is_mended_on_the_wire_only(serve, make_config, make_question) -> None:
    server = serve("--keep-bodies")
    config = make_config(server)
    asked = [
        make_question("a", "lone \ud800, pair \ud83d\ude00, \x00, \u202e, <think>"),
        make_question("b", "[[surrogate]]"),
    ]
    first = list(ask_all(asked, config))
    assert all(o.value for o in first)
    sent = server.rows("call")[0]["body"]["messages"][1]["content"]
    assert sent == "lone \ufffd, pair \U0001f600, \x00, \u202e, <think>"
    assert server.keys()[asked[0].request.key] == 1
    assert values(ask_all(asked, config)) == values(first) and sum(server.asked().values()) == len(
        server.rows("answered")
    )


def test_a_mistake_in_reading_surfaces_and_loses_nothing(serve, make_config, ask_for) -> None:
    def broken(text: str) -> Any:
        raise ZeroDivisionError("a bug")

    server = serve("--latency", "0.1")
    asked = ask_for(30)
    asked[5] = Question("bug", asked[5].request, broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(ask_all(asked, make_config(server)))
    assert len(list(ask_all(ask_for(30), make_config(server)))) == 30
    assert set(server.asked().values()) == {1}


def test_the_same_request_twice_costs_one_call(serve, make_config, make_question) -> None:
    server = serve("--latency", "0.2")
    twins = [make_question(f"t{i}", "the same words") for i in range(20)]
    outcomes = list(ask_all([*twins, make_question("u", "the same words", take=1)], make_config(server)))
    assert len({str(o.value) for o in outcomes}) == 1 and sum(server.asked().values()) == 2
    assert sum(o.paid.output > 0 for o in outcomes) == 2 and all(o.spent.output > 0 for o in outcomes)


def test_questions_are_taken_as_they_are_needed(serve, make_config, ask_for) -> None:
    taken = 0

    def stream() -> Iterator[Any]:
        nonlocal taken
        for q in ask_for(5000):
            taken += 1
            yield q

    outcomes = ask_all(stream(), make_config(serve(), concurrency=4))
    for _ in range(10):
        next(outcomes)
    assert taken < 300
    outcomes.close()


def test_no_more_calls_at_once_than_allowed(serve, make_config, ask_for) -> None:
    server = serve("--latency", "0.05")
    list(ask_all(ask_for(60), make_config(server, concurrency=5)))
    flying = most = 0
    for row in server.rows():
        flying += {"call": 1, "answered": -1}[row["event"]]
        most = max(most, flying)
    assert 3 <= most <= 5


def test_a_free_text_question(serve, make_config) -> None:
    question = Question("t", Request("tiny", (Message("user", "Say something."),), params={"max_tokens": 9}), str)
    server = serve("--keep-bodies")
    (outcome,) = ask_all([question], make_config(server))
    assert isinstance(outcome.value, str) and "response_format" not in server.rows("call")[0]["body"]


def test_progress_shows_what_matters(serve, make_config, ask_for) -> None:
    from io import StringIO

    from rich.console import Console

    from neureasoner.data_builders.endpoint.progress import describe, live

    out, tally = StringIO(), Tally()
    with live(console=Console(file=out, force_terminal=True, width=200)) as watch:
        list(ask_all(ask_for(10), make_config(serve()), progress=watch, total=10, tally=tally))
    assert "10/10" in out.getvalue()
    line = describe(tally)
    assert all(word in line for word in ("10/10", "USD", "requests/min", "ETA 0:00"))
