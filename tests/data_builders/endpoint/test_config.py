"""Settings and prices: what is refused, and by which name."""

from __future__ import annotations

from pathlib import Path

import pytest

from neureasoner.config import from_dict
from neureasoner.data_builders.endpoint.config import EndpointConfig
from neureasoner.data_builders.endpoint.prices import Price, price_of, read_prices
from neureasoner.data_builders.endpoint.requests import Usage
from neureasoner.errors import UserError


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", " "), ("api", "soap"), ("structured", "xml"), ("base_url", "localhost:8000"),
        ("base_url", "http://user:secret@host/v1"), ("base_url", "http://host/v1?key=secret"),
        ("key_env", "sk-secret-1"),
        ("concurrency", 0), ("tries", 0), ("max_tokens", -1), ("retries", -1), ("timeout", 0), ("temperature", -0.1),
        ("timeout", float("nan")), ("max_cost", -1), ("tokens_per_minute", -1), ("ledger", ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"key '{key}'") as caught:
        EndpointConfig(**{"model": "m", key: value})  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_settings_come_from_a_recipe_and_go_into_the_request() -> None:
    config = from_dict(EndpointConfig, {"model": "m", "temperature": 0, "effort": "low", "max_tokens": "50"})
    assert config.params() == {"temperature": 0.0, "effort": "low", "max_tokens": 50}
    assert EndpointConfig("m", max_tokens=0).params() == {}
    with pytest.raises(UserError, match="max_cost"):
        EndpointConfig("m", max_tokens=0, max_cost=1)


def test_the_key_is_asked_for_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert EndpointConfig("m", base_url="http://localhost:1/v1", key_env="NO_SUCH_KEY").key() == ""
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        EndpointConfig("m", key_env="NO_SUCH_KEY").key()
    monkeypatch.setenv("NO_SUCH_KEY", "secret\nsecond: line")
    with pytest.raises(UserError) as caught:
        EndpointConfig("m", key_env="NO_SUCH_KEY").key()
    assert "secret" not in str(caught.value)


def test_prices() -> None:
    assert Price(2.0, 8.0, 0.5, 0.5).cost(Usage(1_000_000, 500_000, 400_000)) == pytest.approx(1.2 + 0.2 + 4.0)
    assert Price(2.0, 8.0, 0.5, 0.5).cost(Usage(1_000_000, 500_000, 400_000), batch=True) == pytest.approx(2.7)
    table = read_prices()
    assert len(table) >= 5 and all(p.output >= p.input >= p.cached >= 0 and p.batch == 0.5 for p in table.values())
    assert price_of(EndpointConfig("gpt-4.1-2025-04-14")) == table["gpt-4.1"]
    assert price_of(EndpointConfig("somebody-elses")) is None
    with pytest.raises(UserError, match="max_cost"):
        price_of(EndpointConfig("somebody-elses", max_cost=1.0))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("models: [1]", "expected a key 'models'"), ("models: {a: {input: 1}}", "model 'a': key 'output' is missing"),
        ("models: {a: {input: 1, output: -1}}", "key 'output'"),
        ("models: {a: {input: yes, output: 1}}", "key 'input'"),
        ("models: {a: {input: 1, output: 1, cash: 2}}", "key 'cash' is unknown"), ("models: {a: 3}", "model 'a'"),
    ],
)  # fmt: skip
def test_a_price_table_that_cannot_be_read_says_where(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        read_prices(path)
