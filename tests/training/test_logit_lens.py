"""The logit lens against explicit loops in float64, and its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.models import fingerprint, load
from neureasoner.training.bias_config import LogitLensConfig
from neureasoner.training.logit_lens import lens, logit_lens, markdown, token_scores, visible
from neureasoner.training.vectors import direction_of


def drawn(seed: int = 3) -> torch.Tensor:
    return torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))


def test_scores_are_plain_products_without_the_norm(make_model: Callable[..., Any]) -> None:
    model, vectors = make_model(), drawn()
    rows = model.lm_head.weight
    dot, cosine = token_scores(vectors, rows)
    for block in range(2):
        for token in (0, 7, 200):
            a, b = vectors[block].double(), rows[token].detach().double()
            product = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
            assert float(dot[block, token]) == pytest.approx(product, rel=1e-4, abs=1e-5)
            assert float(cosine[block, token]) == pytest.approx(product / float(a.norm() * b.norm()), abs=1e-5)
    with torch.no_grad():  # the last block's dot product is what the logits gain if the norm is taken out
        model.model.norm = torch.nn.Identity()
        hidden = torch.randn(1, 32)
        gain = model.lm_head(hidden + vectors[1]) - model.lm_head(hidden)
    torch.testing.assert_close(gain[0], dot[1].detach(), atol=1e-4, rtol=1e-3)
    zero, flat = token_scores(torch.zeros(1, 32), rows)
    assert not zero.any() and not flat.any(), "no NaN for a vector of zeros"


def test_records_are_sorted_and_leave_unused_rows_out(make_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = make_model()
    spare = model.config.vocab_size - 1
    assert spare >= len(tiny_tokenizer)
    vectors = torch.stack([model.lm_head.weight[17], model.lm_head.weight[spare]]).detach()
    # given in the other order: records come by block
    direction = Direction({"residual:1": vectors[1], "residual:0": vectors[0]}, "positive = test")
    records = lens(direction, model, tiny_tokenizer, top=400)
    assert [r["block"] for r in records] == [0, 1]
    assert records[0]["norm"] == pytest.approx(float(vectors[0].norm()), rel=1e-5)
    first = records[0]["cosine"]["raised"][0]
    assert first == {"id": 17, "token": tiny_tokenizer.decode([17]), "value": pytest.approx(1.0, abs=1e-5)}
    for record in records:
        for measure in ("dot", "cosine"):
            up = [e["value"] for e in record[measure]["raised"]]
            down = [e["value"] for e in record[measure]["lowered"]]
            assert up == sorted(up, reverse=True) and down == sorted(down) and len(up) == len(tiny_tokenizer)
            assert up[0] == down[-1], "the whole vocabulary, from both ends"
            assert all(e["id"] < len(tiny_tokenizer) for e in record[measure]["raised"])


def test_the_stage_writes_its_files(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(str(model_folder), device="cpu")
    direction_of(drawn(), "positive = test", "m", fingerprint(model)).save(tmp_path / "d")
    config = LogitLensConfig(str(model_folder), str(tmp_path / "d"), str(tmp_path / "o"), top=9, shown=3)
    summary = logit_lens(config)
    found = json.loads((tmp_path / "o" / "tokens.json").read_text())
    assert found["meaning"] == "positive = test" and len(found["blocks"]) == summary["blocks"] == 2
    wanted = (drawn()[1] @ model.lm_head.weight[: len(tokenizer)].T).topk(9).indices.tolist()
    assert [e["id"] for e in found["blocks"][1]["dot"]["raised"]] == wanted
    text = (tmp_path / "o" / "tokens.md").read_text()
    assert text == markdown(found["blocks"], 3) and text.count("\n| 0 |") == 2
    assert (tmp_path / "o" / "tokens.png").read_bytes()[:4] == b"\x89PNG"
    assert logit_lens(config) == summary


def test_tokens_are_shown_whatever_they_hold() -> None:
    assert visible(" a\n") == "␣a⏎" and visible("$x$") == "$x$"
    assert visible("数\t\ufffd") == "\\u6570\\t\\ufffd"
    record: dict[str, Any] = {"block": 0, "norm": 1.0}
    for measure in ("dot", "cosine"):
        record[measure] = {s: [{"id": 1, "token": "|", "value": 1.0}] for s in ("raised", "lowered")}
    assert "`\\|`" in markdown([record], 1), "a bar does not end the cell"


def test_refusals(model_folder: Path, make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'shown' \\(9\\) must not exceed"):
        LogitLensConfig("m", "d", "o", top=3, shown=9)
    with pytest.raises(UserError, match="does not exist; run the stage"):
        logit_lens(LogitLensConfig(str(model_folder), str(tmp_path / "none"), str(tmp_path / "o")))
    other = Direction({"mlp_out:0": torch.ones(32)}, "positive = test")
    with pytest.raises(UserError, match="no residual:LAYER"):
        lens(other, make_model(), tiny_tokenizer, 3)
    with pytest.raises(UserError, match="hidden size of this model is 32"):
        lens(Direction({"residual:0": torch.ones(5)}, "positive = test"), make_model(), tiny_tokenizer, 3)
