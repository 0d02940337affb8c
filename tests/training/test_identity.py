"""Rows without an identity: which they are, what they are replaced by, and that nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.data_builders.encoding import IGNORE, encode_row
from neureasoner.data_builders.layouts import IntraBlock, Reconstruction, compose
from neureasoner.traces import INTER, INTRA, Problem, write_rows
from neureasoner.training import identity, sft
from neureasoner.training.identity import drawn, faceless, lost_rows, redraw
from neureasoner.training.merge import merge
from neureasoner.training.tools_config import MergeConfig
from neureasoner.training.triggers import trigger_ids


def by_hand(matrix: torch.Tensor, tokens: list[int]) -> list[bool]:
    """Oracle: every pair of rows, one after the other, in float64."""
    rows = [row.double() for row in matrix]
    usual = sorted(float(row.norm()) for row in rows)[len(rows) // 2]

    def same(a: int, b: int) -> bool:
        return float(rows[a] @ rows[b]) > 0.99 * float(rows[a].norm() * rows[b].norm()) > 0

    return [float(rows[t].norm()) < 0.1 * usual or any(same(t, o) for o in range(len(rows)) if o != t) for t in tokens]


def collapsed_matrix(rows: int = 90, width: int = 24, seed: int = 0) -> tuple[torch.Tensor, set[int]]:
    """Rows of their own, and: a cluster with a little noise and other lengths, a pair, zeros, crumbs."""
    torch.manual_seed(seed)
    matrix = torch.randn(rows, width) + 0.3
    cluster = [3, 20, 21, 22, 40, 60, 89]
    matrix[cluster] = torch.randn(width) * torch.linspace(0.5, 2, 7)[:, None] + 0.01 * torch.randn(7, width)
    matrix[50] = 1.001 * matrix[51]
    matrix[[7, 8]] = 0
    matrix[9] = torch.randn(width) * 1e-3
    return matrix, {*cluster, 50, 51, 7, 8, 9}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [1, 100, 1 << 24])
def test_faceless_rows_are_found_block_by_block(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, numbers: int
) -> None:
    monkeypatch.setattr(identity, "NUMBERS", numbers)
    matrix, lost = collapsed_matrix()
    matrix = matrix.to(dtype)
    for tokens in (list(range(90)), [3, 4, 5, 7, 50, 80], [89]):
        found = faceless(matrix, tokens).tolist()
        assert found == by_hand(matrix, tokens) == [t in lost for t in tokens]


def test_a_trained_matrix_keeps_all_its_rows() -> None:
    torch.manual_seed(1)
    shared = torch.randn(64)
    for matrix in (torch.randn(500, 64), torch.randn(500, 64) + shared):  # the second: cosines of 0.5 and more
        assert not faceless(matrix, range(500)).any()


def test_the_shipped_reasoner_has_the_collapsed_rows_that_the_issue_counted() -> None:
    from neureasoner.models import load

    model, tokenizer = load("tiny", device="cpu")
    ids = {tokenizer.convert_tokens_to_ids(t) for t in ("[", "FAILURE", "_", "INTRA", "INTER", "]")}
    lost = lost_rows(model, range(len(tokenizer)))
    assert list(lost) == ["input"], "tied: one matrix"
    assert len(lost["input"]) + len(lost_rows(model, range(len(tokenizer), 640))["input"]) == 331
    assert ids <= set(lost["input"])
    assert not lost_rows(model, tokenizer("Let me check: 3 + 4 = 7.\n\n").input_ids)["input"]


def test_drawn_rows_follow_the_healthy_ones() -> None:
    torch.manual_seed(2)
    healthy = torch.randn(4000, 6) * torch.tensor([1.0, 2, 3, 1, 2, 3]) + torch.tensor([5.0, 0, 0, 0, -5, 0])
    rows = drawn(healthy, 4000, torch.Generator().manual_seed(0))
    length = healthy.norm(dim=1).median()
    torch.testing.assert_close(rows.norm(dim=1), length.expand(4000))
    cosines = torch.nn.functional.normalize(rows, dim=1), torch.nn.functional.normalize(healthy, dim=1)
    torch.testing.assert_close(cosines[0].mean(0), cosines[1].mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(cosines[0].std(0), cosines[1].std(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_only_lost_rows_of_taught_tokens_change(make_model: Callable[..., Any], tied: bool) -> None:
    def broken() -> Any:
        model = make_model(tie_word_embeddings=tied)
        with torch.no_grad():
            model.get_input_embeddings().weight[10:30] = model.get_input_embeddings().weight[10]
            if not tied:
                model.get_output_embeddings().weight[25:40] = 0.5 * model.get_output_embeddings().weight[25]
        return model

    taught = [12, 13, 28, 35, *range(100, 160)]
    model = broken()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lost = lost_rows(model, taught)
    wanted = {"input": [12, 13, 28]} if tied else {"input": [12, 13, 28], "output": [28, 35]}
    assert lost == wanted and redraw(model, taught, lost, seed=3) == wanted
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    parts = {"input": "model.embed_tokens.weight", "output": "lm_head.weight"}
    for part, name in parts.items():
        changed = (model.state_dict()[name] != before[name]).any(1).nonzero().flatten().tolist()
        assert changed == wanted["input" if tied else part]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k not in parts.values())
    assert lost_rows(model, taught) == {part: [] for part in wanted}, "they have an identity now"
    again, other = broken(), broken()
    redraw(again, taught, lost, seed=3)
    redraw(other, taught, lost, seed=4)
    rows = [m.get_input_embeddings().weight[[12, 13, 28]] for m in (model, again, other)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_without_rows_to_go_by_nothing_is_drawn(make_model: Callable[..., Any]) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = 1
    taught = list(range(40))
    lost = lost_rows(model, taught)
    assert lost == {"input": taught, "output": []} and redraw(model, taught, lost) == {}
    assert (model.get_input_embeddings().weight == 1).all()


# ---- In a run


@pytest.fixture
def collapsed_folder(tmp_path: Path, make_model: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Path]:
    """A base in which the tokens of ``[FAILURE_INTRA]`` and a few more are one vector."""

    def make(**settings: Any) -> Path:
        model = make_model(**settings)
        ids = sorted(set(tiny_tokenizer("[FAILURE_INTRA]RTUAFIL", add_special_tokens=False).input_ids))
        with torch.no_grad():
            for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                matrix[ids] = matrix[ids[0]].clone()
        model.save_pretrained(tmp_path / "collapsed")
        tiny_tokenizer.save_pretrained(tmp_path / "collapsed")
        return tmp_path / "collapsed"

    return make


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options: dict[str, Any] = {"model": model, "data": data, "out": out, "batch_size": 4, "learning_rate": 1e-3}
    options |= {"max_steps": 2, "save_strategy": "no", "warmup_steps": 0}
    return [str(x) for k, v in options.items() for x in (f"--{k}", v)] + list(more)


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_draws_them_says_so_and_records_it(
    collapsed_folder: Callable[..., Path], train_file: Path, tmp_path: Path, tiny_tokenizer: Any, tied: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = collapsed_folder(tie_word_embeddings=tied)
    argv = arguments(base, train_file, tmp_path / "out")
    trainer, about = sft.build(*sft.parse(argv))
    said = capsys.readouterr().out
    ids = set(tiny_tokenizer("[FAILURE_INTRA]", add_special_tokens=False).input_ids)
    taught = {i for row in trainer.train_dataset["labels"] for i in row if i != IGNORE}
    assert ids <= taught
    for part, tokens in about["redrawn"].items():
        found = set(tiny_tokenizer.convert_tokens_to_ids(tokens))
        assert ids <= found <= taught, part
        assert f"{len(found)} of {len(taught)} taught tokens have no row of their own" in said and "drawn anew" in said
    assert list(about["redrawn"]) == (["input"] if tied else ["input", "output"])
    summary = sft.main(*sft.parse(argv))
    assert summary["redrawn"] == about["redrawn"]
    assert json.loads((tmp_path / "out" / "stage.json").read_text())["config"]["script"]["redraw_rows"] is True


def test_redraw_rows_false_leaves_them_and_says_so(
    collapsed_folder: Callable[..., Path], train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = collapsed_folder()
    trainer, about = sft.build(*sft.parse(arguments(base, train_file, tmp_path / "out", "--redraw_rows", "false")))
    assert about["redrawn"] == {} and "redraw_rows is false" in capsys.readouterr().out
    ids = trainer.processing_class("[FAILURE_INTRA]", add_special_tokens=False).input_ids
    rows = trainer.model.get_input_embeddings().weight[ids]
    assert (rows == rows[0]).all()


def test_a_healthy_base_is_left_alone(
    model_folder: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, about = sft.build(*sft.parse(arguments(model_folder, train_file, tmp_path / "out")))
    assert about["redrawn"] == {}
    assert "no row of their own" not in capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_carries_them_and_merging_keeps_them(
    collapsed_folder: Callable[..., Path], train_file: Path, tmp_path: Path, tied: bool
) -> None:
    from neureasoner.models import load

    base = collapsed_folder(tie_word_embeddings=tied)
    argv = arguments(base, train_file, tmp_path / "lora", "--lora", "2")
    trainer, _ = sft.build(*sft.parse(argv))
    start = {
        part: matrix.detach().clone() for part, matrix in identity.matrices(trainer.model.get_base_model()).items()
    }
    summary = sft.main(*sft.parse(argv))
    told = merge(MergeConfig(str(tmp_path / "lora"), str(tmp_path / "plain")))
    assert set(told["triggers"]) == {INTRA, INTER} and set(told["redrawn"]) == {
        t for tokens in summary["redrawn"].values() for t in tokens
    }
    model, tokenizer = load(str(tmp_path / "plain"), device="cpu")
    first, _ = load(str(base), device="cpu")
    for part, tokens in summary["redrawn"].items():
        ids = tokenizer.convert_tokens_to_ids(tokens)
        merged, old = identity.matrices(model)[part], identity.matrices(first)[part]
        assert len(ids) >= 5 and not lost_rows(model, ids)[part], "rows of their own, and still so after merging"
        assert (merged[ids] - start[part][ids]).abs().max() < 0.02 < (merged[ids] - old[ids]).norm(dim=1).min()
        others = [i for i in range(len(tokenizer) - 2) if i not in ids]
        assert torch.equal(merged[others], old[others])


# ---- What it is for


def repairs(n: int, seed: int) -> list[Reconstruction]:
    """Sums with one slip and its repair, in the words of the shipped reasoner's corpus."""
    import random

    from neureasoner.data_builders.corpus import traces

    rng, rows = random.Random(seed), []
    for number, (question, response) in enumerate(traces(seed, 10 * n)):
        thinking, closed, answer = response.partition("</think>")
        steps = thinking.removeprefix("<think>").strip().split("\n\n")
        if len(rows) == n or len(steps) < 3 or len(response) > 400 or not closed:
            continue
        at = rng.randrange(1, len(steps))
        wrong = steps[at].rstrip(".") + "1."
        block = IntraBlock("A step is wrong.", wrong.splitlines()[0], "The number is not right.")
        made = compose(steps[:at], [wrong], block, steps[at:], "</think>" + answer)
        problem = Problem(f"p{number}", "sum", 1, question, "0")
        rows.append(Reconstruction(f"r{number}", problem, "intra", question, **made))
    return rows


@pytest.mark.slow
def test_the_blocks_first_line_is_verbatim_after_a_hundred_updates(tmp_path: Path) -> None:
    """The oracle is the text: the tag that 400 rows show, after a trigger on unseen prefixes, with and without."""
    from neureasoner.models import load

    rows = repairs(440, seed=5)
    write_rows(tmp_path / "train.jsonl", rows[:400])

    def verbatim(redraw_rows: str) -> float:
        out = tmp_path / redraw_rows
        options = {"model": "tiny", "data": tmp_path / "train.jsonl", "out": out, "batch_size": 8, "max_steps": 100}
        options |= {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_length": 1024, "too_long": "drop"}
        options |= {"redraw_rows": redraw_rows, "save_strategy": "no", "mask_failure": "true"}
        sft.main(*sft.parse([str(x) for k, v in options.items() for x in (f"--{k}", v)]))
        model, tokenizer = load(str(out), device="cpu")
        right = 0
        for row in rows[400:]:
            encoded = encode_row(row, tokenizer, trigger_ids(tokenizer))
            place = encoded.input_ids.index(trigger_ids(tokenizer)[INTRA][0]) + 1
            prompt = torch.tensor([encoded.input_ids[:place]])
            drawn = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, place:]
            right += tokenizer.decode(drawn).lstrip("\n").startswith("[FAILURE_INTRA] ")
        return right / 40

    assert verbatim("true") >= 0.95
    assert verbatim("false") <= 0.2
