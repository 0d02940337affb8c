"""Packing: labels stay those of promise 6, and no document sees another."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.data_builders.encoding import IGNORE
from neureasoner.errors import UserError
from neureasoner.training import sft


def parsed(model: Path, data: Path, out: Path, *more: str) -> Any:
    options: dict[str, Any] = {"model": model, "data": data, "out": out, "batch_size": 2, "max_length": 900}
    return sft.parse([str(x) for k, v in options.items() for x in (f"--{k}", v)] + list(more))


def documents(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document of a packed batch: a new one begins where the position is 0."""
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return [(ids[a:b], labels[a:b]) for a, b in pairwise(starts)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_keep_labels_and_are_blind_to_each_other(
    model_folder: Path, train_file: Path, tmp_path: Path, attention: str
) -> None:
    plain, _ = sft.build(*parsed(model_folder, train_file, tmp_path / "a"))
    packed, _ = sft.build(
        *parsed(model_folder, train_file, tmp_path / "b", "--packing", "true", "--attention", attention)
    )
    assert packed.model.config._attn_implementation == attention
    batches = list(packed.get_train_dataloader())
    found = [d for batch in batches for d in documents(batch)]
    assert len(batches) < len(found) == 12
    rows = Counter((tuple(r["input_ids"]), tuple(r["labels"])) for r in plain.train_dataset)
    assert rows == Counter((tuple(i), tuple(x)) for i, x in found), "every row once, with its labels"

    model = packed.model.eval()
    for batch in batches:
        batch = {k: v for k, v in batch.items() if k != "use_cache"}
        with torch.no_grad():
            out = model(**batch, use_cache=False, fused_lm_head=True)
            alone = []
            for ids, labels in documents(batch):
                logits = plain.model.eval()(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
                alone += [logits[t - 1, labels[t]] for t in range(1, len(ids)) if labels[t] != IGNORE]
        got = out.log_probs[out.log_probs != 0]
        torch.testing.assert_close(got.double(), torch.stack(alone), atol=1e-4, rtol=0)


def test_a_packed_run_resumes_to_the_same_weights(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    more = ["--packing", "true", "--max_steps", "4", "--save_steps", "2", "--learning_rate", "0.01"]
    sft.main(*parsed(model_folder, train_file, tmp_path / "whole", *more))
    with pytest.raises(KeyboardInterrupt):
        sft.main(*parsed(model_folder, train_file, tmp_path / "killed", *more), [Stop()])
    sft.main(*parsed(model_folder, train_file, tmp_path / "killed", *more))
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "killed"))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--packing", "true", "--packing_strategy", "wrapped"], "set it to 'bfd'"),
        (["--packing", "true", "--max_length", "0"], "packing needs max_length"),
        (["--use_liger_kernel", "true"], "use_liger_kernel needs a GPU"),
        (["--attention", "flash_attention_2"], "attention 'flash_attention_2' needs a GPU"),
        (["--load_best_model_at_end", "true", "--save_strategy", "no"], "load_best_model_at_end True is not supported"),
    ],
)
def test_what_the_machine_cannot_do_is_refused(
    model_folder: Path, train_file: Path, tmp_path: Path, more: list[str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        sft.main(*parsed(model_folder, train_file, tmp_path / "out", "--use_cpu", "true", "--bf16", "false", *more))
    assert not list((tmp_path / "out").glob("*"))


def test_fsdp_on_a_cpu_is_refused(
    model_folder: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, args = parsed(model_folder, train_file, tmp_path / "out", "--use_cpu", "true", "--bf16", "false")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="use configs/accelerate/ddp"):
        sft.check_machine(script, args)
