"""Directions: their forms, files and controls, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.models import fingerprint

SIZES = {"neuron": 48, "head": 4}


def sample(**changes: Any) -> Direction:
    """Every form a value can have, on the sizes of ``make_model``."""
    values = {
        "residual:1": torch.randn(32),
        "mlp_out:0": torch.randn(32),
        "neuron:1[5,0,7]": torch.tensor([2.0, -3.0, 0.5]),
        "head:0[3,1]": torch.randn(2, 12),
    }
    settings: dict[str, Any] = {"meaning": "positive = shorter thinking", "model": "m"}
    settings["info"] = {"sizes": SIZES, "std": {"neuron:1[5,0,7]": [0.1, 0.2, 0.3]}}
    return Direction(values, **(settings | changes))


def test_save_and_load_give_the_same(tmp_path: Path) -> None:
    one = sample(fingerprint="abc")
    one.save(tmp_path / "d")
    two = Direction.load(tmp_path / "d")
    assert two.sites == one.sites == ["residual:1", "mlp_out:0", "neuron:1[5,0,7]", "head:0[3,1]"]
    assert all(torch.equal(two.values[s], one.values[s]) for s in one.sites)
    assert (two.meaning, two.model, two.fingerprint, two.info) == (one.meaning, "m", "abc", one.info)
    assert json.loads((tmp_path / "d/direction.json").read_text())["norms"] == one.norms()


def test_values_become_float32_and_sites_canonical() -> None:
    one = Direction({"neuron:3[1, 5]": torch.tensor([1, 2], dtype=torch.float64)}, "positive = up")
    assert one.sites == ["neuron:3[1,5]"] and one.values["neuron:3[1,5]"].dtype == torch.float32
    with pytest.raises(TypeError):
        one.values["residual:0"] = torch.zeros(3)  # type: ignore[index]


def test_norms_scale_and_sign() -> None:
    one = sample()
    for site, value in one.values.items():
        assert one.norms()[site] == pytest.approx(sum(x * x for x in value.flatten().tolist()) ** 0.5, rel=1e-6)
        assert torch.equal((-one).values[site], -value)
        assert torch.equal(one.scaled(0.5).values[site], value / 2)
    assert one.meaning in (-one).meaning and (-one).meaning != one.meaning
    assert one.scaled(2).meaning == one.meaning and one.scaled(2).info == one.info


def test_random_like_has_the_norms_and_other_places() -> None:
    one = sample()
    two, again, other = one.random_like(1), one.random_like(1), one.random_like(2)
    assert two.sites == again.sites and all(torch.equal(two.values[s], again.values[s]) for s in two.sites)
    assert two.sites != other.sites
    assert list(two.norms().values()) == pytest.approx(list(one.norms().values()), rel=1e-5)
    assert two.sites[:2] == one.sites[:2]
    cosine = torch.nn.functional.cosine_similarity(two.values["residual:1"], one.values["residual:1"], dim=0)
    assert abs(float(cosine)) < 0.8
    neurons, heads = two.sites[2], two.sites[3]
    assert neurons.startswith("neuron:1[") and heads.startswith("head:0[")
    assert not set(json.loads(neurons[8:])) & {5, 0, 7} and set(json.loads(heads[6:])) == {0, 2}
    assert sorted(two.values[neurons].abs().tolist()) == [0.5, 2.0, 3.0]
    # each slice keeps a size of its own, not only their sum
    assert sorted(two.values[heads].norm(dim=1).tolist()) == pytest.approx(
        sorted(one.values["head:0[3,1]"].norm(dim=1).tolist()), rel=1e-5
    )
    assert two.info["std"] == {neurons: [0.1, 0.2, 0.3]} and "random" in two.meaning


def test_random_like_takes_old_places_when_a_block_has_no_others() -> None:
    one = Direction({"head:0[3,1,2]": torch.ones(3, 12)}, "positive = up", info={"sizes": SIZES})
    indices = json.loads(one.random_like(0).sites[0][6:])
    assert 0 in indices and len(set(indices)) == 3


def test_random_signs_are_random() -> None:
    one = Direction({f"neuron:0[{','.join(map(str, range(20)))}]": torch.ones(20)}, "m", info={"sizes": SIZES})
    total = torch.stack([next(iter(one.random_like(s).values.values())) for s in range(50)])
    assert abs(float(total.mean())) < 0.15  # 1000 coins: standard deviation 0.03


def test_random_like_needs_the_sizes() -> None:
    with pytest.raises(UserError, match="how many neurons a block has"):
        sample(info={}).random_like(0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "one site at least"),
        ({"logits": torch.ones(2)}, "holds no vector"),
        ({"neuron:3": torch.ones(2)}, "needs its indices"),
        ({"neuron:3[1,2]": torch.ones(3)}, "must be \\[indices\\]"),
        ({"head:3[1,2]": torch.ones(2)}, "head size"),
        ({"residual:3": torch.ones(1, 32)}, "hidden size"),
        ({"residual:3": torch.tensor([1.0, float("nan")])}, "NaN"),
        ({"residual:3": torch.tensor([1e300], dtype=torch.float64)}, "NaN or infinity, in float32"),
        ({"neuron:3[1,2]": torch.ones(2), "neuron:3[1, 2]": torch.ones(2)}, "twice"),
        ({"nothing:3": torch.ones(2)}, "unknown"),
    ],
)
def test_bad_values_are_refused(values: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Direction(values, "positive = up")


@pytest.mark.parametrize("meaning", ["", "  "])
def test_no_meaning_is_refused(meaning: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="meaning of its sign"):
        sample(meaning=meaning)
    sample().save(tmp_path)
    info = json.loads((tmp_path / "direction.json").read_text())
    (tmp_path / "direction.json").write_text(json.dumps({**info, "meaning": meaning}))
    with pytest.raises(UserError, match=f"{tmp_path}.*meaning of its sign"):
        Direction.load(tmp_path)


def test_check_accepts_its_model_and_refuses_others(make_model: Any) -> None:
    model, trained = make_model(), make_model(seed=1)
    one = sample(fingerprint=fingerprint(model))
    one.check(model)
    with pytest.raises(UserError, match="made on model 'm'"):
        one.check(trained)
    one.check(trained, accept=[fingerprint(trained)])
    sample().check(trained)  # no fingerprint: any model of these sizes
    with pytest.raises(UserError, match="the hidden size of this model is 64"):
        sample().check(make_model(hidden_size=64))
    with pytest.raises(UserError, match="the size of a head of this model is 16"):
        sample().check(make_model(head_dim=16))
    with pytest.raises(UserError, match="layer 1 is out of range"):
        sample().check(make_model(num_hidden_layers=1))
    with pytest.raises(UserError, match="neuron 7 is out of range"):
        sample().check(make_model(intermediate_size=6))


def test_missing_damaged_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no direction\.json"):
        Direction.load(tmp_path / "none")
    sample().save(tmp_path)
    file = tmp_path / "direction.json"
    info = json.loads(file.read_text())
    for change, message in (
        ({"schema": 99}, "schema 1"),
        ({"kind": "rcn"}, "not one of a direction"),
        ({"tensors": "other"}, "of different runs"),
        ({"sites": ["residual:9"]}, "'residual:9' is missing"),
    ):
        file.write_text(json.dumps({**info, **change}))
        with pytest.raises(UserError, match=message):
            Direction.load(tmp_path)
    file.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Direction.load(tmp_path)
    file.write_text(json.dumps(info))
    (tmp_path / "direction.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="not a safetensors file"):
        Direction.load(tmp_path)
    (tmp_path / "direction.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        Direction.load(tmp_path)
