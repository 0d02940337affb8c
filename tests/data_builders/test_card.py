"""The data set's card: the folder loads with ``datasets``, and its token counts are the trainer's."""

from __future__ import annotations

from pathlib import Path

from neureasoner.artifacts import read_json
from neureasoner.data_builders.config import ReconstructConfig
from neureasoner.data_builders.encoding import prompt_text
from neureasoner.data_builders.reconstruct import reconstruct
from neureasoner.models import load_tokenizer
from neureasoner.traces import read_jsonl


def test_the_folder_is_a_data_set(tmp_path: Path, monkeypatch) -> None:
    from datasets import config, load_dataset

    monkeypatch.setattr(config, "HF_DATASETS_OFFLINE", True)
    reconstruct(ReconstructConfig(out=str(tmp_path / "d"), corpus=40, instance=0.3, seed=2))
    rows = [row for _, row in read_jsonl(tmp_path / "d/train.jsonl")]
    loaded = load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))["train"].to_list()
    for row, got in zip(rows, loaded, strict=True):
        control = {k: v for k, v in got["control"].items() if v is not None}
        assert {**got, "control": control} == row


def test_token_counts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    config = ReconstructConfig(out=str(tmp_path), corpus=30, intra=0.5, inter=0, plain=1, seed=2, tokenizer="tiny")
    reconstruct(config)
    counts = read_json(tmp_path / "summary.json")["tokens"]
    rows = [row for _, row in read_jsonl(tmp_path / "train.jsonl")]
    plain = [r for r in rows if r["level"] == "plain"]
    begins = [len(tokenizer(prompt_text(tokenizer, r["prompt"])).input_ids) for r in plain]
    ends = [len(tokenizer(r["response"]).input_ids) + 1 for r in plain]  # and the end token
    assert counts["plain"]["tokens"] == sum(begins) + sum(ends) and counts["plain"]["trained"] == sum(ends)
    assert counts["plain"]["longest"] == max(a + b for a, b in zip(begins, ends, strict=True))
    assert counts["all"]["rows"] == len(rows) == counts["plain"]["rows"] + counts["intra"]["rows"]
    assert f"| all | {len(rows)} |" in (tmp_path / "README.md").read_text()
