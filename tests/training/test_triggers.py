"""Trigger tokens: where they go, what they start from, and that adding them twice changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.traces import INTER, INTRA
from neureasoner.training.triggers import add_triggers, trigger_ids


def assert_near_but_not_one(one: torch.Tensor, two: torch.Tensor, mean: torch.Tensor) -> None:
    for row in (one, two):
        assert 0.05 < float((row - mean).norm() / mean.norm()) < 0.2
    assert float(torch.cosine_similarity(one, two, dim=0)) < 0.99


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [5, 1, 0])
def test_rows_are_the_mean_of_the_others(
    make_model: Callable[..., Any], own_tokenizer: Any, tied: bool, spare: int
) -> None:
    known = len(own_tokenizer)
    model = make_model(tie_word_embeddings=tied, vocab_size=known + spare)
    before = [m.weight[:known].detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    ids = add_triggers(model, own_tokenizer)
    assert ids == {INTRA: [known], INTER: [known + 1]}
    assert model.config.vocab_size == known + max(spare, 2), "grows only if there are too few spare rows"
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    for old, module in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.equal(module.weight[:known], old), "no other row moves"
        one, two = (module.weight[place].detach() for (place,) in ids.values())
        torch.testing.assert_close((one + two) / 2, old.mean(0), msg="the two have the mean between them")
        assert_near_but_not_one(one, two, old.mean(0))
    assert own_tokenizer.convert_ids_to_tokens(own_tokenizer("a.\n\n<INTRA>\nb").input_ids).count(INTRA) == 1


def test_a_second_call_changes_nothing(make_model: Callable[..., Any], own_tokenizer: Any) -> None:
    model = make_model()
    first = add_triggers(model, own_tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[first[INTRA]] = 3.0
    state, size = {k: v.clone() for k, v in model.state_dict().items()}, len(own_tokenizer)
    assert add_triggers(model, own_tokenizer) == first
    assert len(own_tokenizer) == size
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_keep_leaves_spare_rows_alone(make_model: Callable[..., Any], own_tokenizer: Any) -> None:
    model = make_model()
    before = model.get_input_embeddings().weight.detach().clone()
    add_triggers(model, own_tokenizer, init="keep")
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("spare", [5, 0])
def test_rows_are_the_mean_of_a_description(make_model: Callable[..., Any], own_tokenizer: Any, spare: int) -> None:
    model = make_model(vocab_size=len(own_tokenizer) + spare)
    texts = {INTRA: "that is wrong", INTER: "Another route"}
    matrices = (model.get_input_embeddings, model.get_output_embeddings)
    wanted = {t: [m().weight[own_tokenizer(texts[t]).input_ids].detach().mean(0) for m in matrices] for t in texts}
    ids = add_triggers(model, own_tokenizer, init="description", descriptions=texts)
    for token, (place,) in ids.items():
        for value, matrix in zip(wanted[token], matrices, strict=True):
            torch.testing.assert_close(matrix().weight[place], value)
    with pytest.raises(UserError, match="<NEW> has no description"):
        add_triggers(model, own_tokenizer, ["<NEW>"], init="description", descriptions=texts)


def test_tokens_the_matrix_lacks_get_rows_too(make_model: Callable[..., Any], own_tokenizer: Any) -> None:
    known = len(own_tokenizer)
    model = make_model(vocab_size=known - 3)
    mean = model.get_input_embeddings().weight.detach().mean(0)
    assert add_triggers(model, own_tokenizer, init="keep") == {INTRA: [known], INTER: [known + 1]}
    rows = model.get_input_embeddings().weight[known - 3 :].detach()
    for row in rows[:3]:
        torch.testing.assert_close(row, mean)
    assert_near_but_not_one(rows[3], rows[4], mean)


def test_unknown_init_is_refused(make_model: Callable[..., Any], own_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="mean"):
        add_triggers(make_model(), own_tokenizer, init="zero")


def test_a_saved_tokenizer_keeps_them(make_model: Callable[..., Any], own_tokenizer: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    ids = add_triggers(make_model(), own_tokenizer)
    own_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert trigger_ids(again) == ids and {INTRA, INTER} <= set(again.all_special_tokens)


def test_without_adding_a_trigger_is_its_pieces(tiny_tokenizer: Any) -> None:
    ids = trigger_ids(tiny_tokenizer)
    assert all(len(v) > 1 for v in ids.values()) and tiny_tokenizer.decode(ids[INTRA]) == INTRA


@pytest.mark.parametrize("init", ["mean", "description", "keep"])
@pytest.mark.parametrize("seed", [0, 7])
def test_two_triggers_never_start_as_one_vector(
    make_model: Callable[..., Any], own_tokenizer: Any, init: str, seed: int
) -> None:
    model = make_model()
    with torch.no_grad():  # spare rows as real models have them
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            matrix[len(own_tokenizer) :] = matrix[3]
    same = dict.fromkeys((INTRA, INTER), "that is wrong")
    ids = add_triggers(model, own_tokenizer, init=init, descriptions=same, seed=seed)
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        one, two = (matrix[place] for (place,) in ids.values())
        assert float(torch.cosine_similarity(one, two, dim=0)) < 0.99
    again = make_model()
    assert add_triggers(again, own_tokenizer, init="keep") == ids, "known to the tokenizer now"


def test_the_step_apart_is_the_seeds(make_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    def rows(seed: int) -> torch.Tensor:
        model, tokenizer = make_model(), copy.deepcopy(tiny_tokenizer)
        ids = add_triggers(model, tokenizer, seed=seed)
        return torch.stack([model.get_input_embeddings().weight[i].detach() for (i,) in ids.values()])

    assert torch.equal(rows(1), rows(1)) and not torch.equal(rows(1), rows(2))


def test_one_trigger_alone_is_the_mean_itself(make_model: Callable[..., Any], own_tokenizer: Any) -> None:
    model = make_model()
    mean = model.get_input_embeddings().weight[: len(own_tokenizer)].detach().mean(0)
    ids = add_triggers(model, own_tokenizer, [INTRA])
    torch.testing.assert_close(model.get_input_embeddings().weight[ids[INTRA][0]], mean)
