"""The doctor finds what is there, and its hook check can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.doctor import check_model, doctor, versions
from neureasoner.floor_config import DoctorConfig


@pytest.fixture
def folder(tmp_path: Path, make_model: Any, tiny_tokenizer: Any) -> str:
    make_model().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_doctor_reports_machine_and_model(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor(DoctorConfig(folder, device="cpu"))
    assert found["packages"]["torch"] == torch.__version__ == versions()["torch"]
    assert "float32" in found["dtypes"]["cpu"] and {"eager", "sdpa"} <= set(found["attention"])
    model = found["model"]
    assert model["hooks_fire"] and model["left_padding"]["consistent"]
    assert set(model["hooks"].values()) == {model["expected_calls"]}
    assert "hooks fire" in capsys.readouterr().out


def test_hooks_that_do_not_fire_are_noticed(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.nn.Module, "register_forward_pre_hook", lambda self, hook: self.register_forward_hook(lambda *_: None)
    )
    found = check_model(folder, "cpu")
    assert not found["hooks_fire"] and found["hooks"]["neuron"] == 0 and found["hooks"]["residual"] > 0
