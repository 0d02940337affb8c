"""What was forecast against what was then paid, by the server's own count."""

from __future__ import annotations

import random
import time

import pytest

from neureasoner.data_builders.endpoint.asker import ask_all
from neureasoner.data_builders.endpoint.forecast import forecast
from neureasoner.data_builders.endpoint.tally import Tally


def bill(rows) -> float:
    usages = [r["usage"] for r in rows]
    return sum(u["prompt_tokens"] - 3 + 1.5 + 4 * u["completion_tokens"] for u in usages) / 1e6


def test_a_forecast_with_a_few_real_calls_is_right_within_ten_percent(serve, make_config, make_question) -> None:
    rng = random.Random(0)
    # prompts of very different lengths, and some answers that are torn and asked again
    server = serve("--fault", "torn:0.06", "--latency", "0.01")
    asked = [make_question(f"q{i}", f"{i}: " + "word " * rng.randrange(5, 400)) for i in range(300)]
    config = make_config(server)
    told = forecast(iter(asked), config, probe=60)
    probes = len(server.rows("answered"))
    assert told.questions == 300 and told.answered == 60 and told.measured == 60 and told.margin is not None
    assert told.probe_cost == pytest.approx(bill(server.rows("answered")))
    list(ask_all(asked, config))
    rest = server.rows("answered")[probes:]
    assert told.requests == pytest.approx(len(rest), rel=0.1)
    assert told.input_tokens == pytest.approx(sum(r["usage"]["prompt_tokens"] for r in rest), rel=0.1)
    assert told.output_tokens == pytest.approx(sum(r["usage"]["completion_tokens"] for r in rest), rel=0.1)
    assert told.cost == pytest.approx(bill(rest), rel=0.1)
    assert abs(told.cost - bill(rest)) <= told.margin * told.cost
    assert told.batch_cost == pytest.approx(told.cost / 2)
    assert set(server.asked().values()) == {1}, "what was probed was not asked again"


def test_a_forecast_without_calls_sends_nothing_and_needs_no_key(serve, make_config, ask_for, monkeypatch) -> None:
    server = serve()
    config = make_config(server)
    list(ask_all(ask_for(20), config))
    before = server.log.read_bytes()
    monkeypatch.delenv("TEST_KEY")
    told = forecast(ask_for(50), config)
    assert (told.questions, told.answered, told.requests, told.measured) == (50, 20, 30, 20)
    assert server.log.read_bytes() == before
    blind = forecast(ask_for(50), make_config(server, model="other", ledger=config.ledger + "2", base_url=""))
    assert blind.requests == 50 and blind.cost is None and blind.seconds is None and blind.output_tokens == 50 * 100
    assert "50" in str(blind) and "assumed" in str(blind) and "unknown" in str(blind)
    counted = forecast(
        ask_for(50), make_config(server, ledger=config.ledger + "3"), count=lambda text: len(text.split())
    )
    assert counted.input_tokens == 50 * (1 + 3 + 8) and counted.cost is not None
    assert forecast(ask_for(20), config).requests == 0 and "0 requests" not in str(told)


@pytest.mark.slow
def test_the_time_is_that_of_the_limit(serve, make_config, ask_for) -> None:
    server = serve("--limit", "requests:10/1", "--latency", "0.01")
    config = make_config(server)
    told = forecast(ask_for(60), config, probe=9)
    begin, tally = time.monotonic(), Tally()
    list(ask_all(ask_for(60), config, tally=tally))
    took = time.monotonic() - begin
    assert told.seconds is not None and told.seconds == pytest.approx(took, rel=0.4), "a burst is granted on top"
