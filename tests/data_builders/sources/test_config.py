"""Settings are checked by name, and need nothing but the standard library."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from neureasoner.config import from_dict, parse
from neureasoner.data_builders.sources.config import ImportConfig
from neureasoner.errors import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": ""}, "key 'input' is empty"),
        ({"format": "xml"}, "key 'format' must be auto, sharegpt, messages, columns"),
        ({"select": "right"}, "key 'select'"),
        ({"columns": {"answers": "a"}}, "key 'columns': role 'answers' is unknown"),
        ({"shard": "0/4"}, "key 'shard' must be i/n with i from 1 to n"),
        ({"shard": "5/4"}, "key 'shard'"),
        ({"shard": "1"}, "key 'shard'"),
        ({"share": 0}, "key 'share'"),
        ({"limit": -1}, "key 'limit'"),
        ({"workers": 0}, "key 'workers'"),
        ({"verify_timeout": 0}, "key 'verify_timeout'"),
        ({"benchmark": ["x"]}, "did you mean 'benchmarks'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(ImportConfig, {"input": "x.jsonl", "out": "o", **settings})


def test_the_command_line() -> None:
    argv = ["--input", "a/b", "--out", "o", "--columns", "question=q,answer=gold"]
    argv += ["--benchmarks", "x.jsonl", "y=z.jsonl", "--shard", "2/3"]
    config = parse(ImportConfig, argv, "neureasoner data import")
    assert config.columns == {"question": "q", "answer": "gold"} and config.benchmarks == ["x.jsonl", "y=z.jsonl"]
    assert config.shard_of == (1, 3)


def test_settings_import_nothing_heavy() -> None:
    code = (
        "import sys, neureasoner.data_builders.sources.config as c\n"
        "print([m for m in ('torch', 'numpy', 'datasets', 'pyarrow', 'math_verify') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
