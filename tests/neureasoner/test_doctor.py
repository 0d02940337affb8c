"""The doctor finds what is there, and its hook check can fail."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.doctor import check_model, doctor, untested, versions
from neureasoner.floor_config import DoctorConfig


@pytest.fixture
def folder(tmp_path: Path, make_model: Any, tiny_tokenizer: Any) -> str:
    make_model().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_doctor_reports_machine_and_model(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor(DoctorConfig(folder, device="cpu"))
    # a CUDA build's metadata lacks the "+cu130" that the module has
    installed = [v.split("+")[0] for v in (found["packages"]["torch"], torch.__version__, versions()["torch"] or "")]
    assert len(set(installed)) == 1
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


def test_the_end_tokens_of_both_places_are_told(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(folder) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [7, 389]}))
    found = doctor(DoctorConfig(folder, device="cpu"))
    assert set(found["model"]["ends"].values()) == {7, 389, 383}  # <|im_end|> is the tokenizer's
    assert found["model"]["ends"]["<|im_end|>"] == 383 and found["model"]["ends"]["id 389"] == 389
    assert found["model"]["thinking"] == "the chat template opens it"
    assert not any("end token" in w for w in found["warnings"])
    assert "<|im_end|> 383" in capsys.readouterr().out


def test_a_model_that_cannot_end_or_be_asked(
    tmp_path: Path, make_model: Any, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model("llama", eos_token_id=None, pad_token_id=None).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"eos_token": None, "pad_token": None, "chat_template": None}
    file.write_text(json.dumps(settings))
    found = doctor(DoctorConfig(str(tmp_path), device="cpu"))
    assert (
        found["model"]["ends"] == {} and found["model"]["hooks_fire"] and found["model"]["left_padding"]["consistent"]
    )
    assert any("token limit" in w for w in found["warnings"]) and any("chat template" in w for w in found["warnings"])
    shown = capsys.readouterr().out
    assert "warning:" in shown and "none" in shown


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 2},
        {"stop_strings": ["a"]},
        {"cache_implementation": "static"},
        {"num_beams": 3, "num_return_sequences": 2},
        {"bad_words_ids": [[5]], "max_time": 0.0001},
    ],
)
def test_the_folders_own_settings_do_not_reach_the_check(folder: str, settings: dict[str, Any]) -> None:
    file = Path(folder) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    found = check_model(folder, "cpu")
    assert found["hooks_fire"] and set(found["hooks"].values()) == {found["expected_calls"]}


@pytest.mark.parametrize(
    ("end", "who"), [("", "the model"), ("<think>\n", "template opens"), ("<think>\n\n</think>\n\n", "template closes")]
)
def test_who_opens_the_thinking(tmp_path: Path, make_model: Any, tiny_tokenizer: Any, end: str, who: str) -> None:
    make_model().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }} say </think> or <think>." + end)
    assert who in check_model(str(tmp_path), "cpu")["thinking"]


def test_a_template_that_fails_is_told(tmp_path: Path, make_model: Any, tiny_tokenizer: Any) -> None:
    make_model().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('a system turn, please') }}")
    found = doctor(DoctorConfig(str(tmp_path), device="cpu"))
    assert "a system turn, please" in found["model"]["thinking"]
    assert any("template fails" in w for w in found["warnings"])


def test_versions_outside_the_tested_ranges(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda _: [
            "torch>=2.11,<2.16",
            "transformers>=5.16.1,<6",
            "openai<4,>=3; extra == 'openai'",
            "scikit-learn>=1.7",
        ],
    )
    installed = {"torch": "2.13.0+cpu", "transformers": "6.1.0", "openai": "2.0", "scikit-learn": None}
    assert untested(installed) == {"transformers": "<6,>=5.16.1", "openai": "<4,>=3"}
    assert untested({"transformers": "5.24.0", "torch": "2.16.0"}) == {"torch": "<2.16,>=2.11"}
    monkeypatch.setattr("neureasoner.doctor.versions", lambda: installed)
    found = doctor(DoctorConfig())
    assert [w.split()[:2] for w in found["warnings"]] == [["transformers", "6.1.0"], ["openai", "2.0"]]
    assert "tested" in capsys.readouterr().out


def test_the_check_works_on_weights_that_lie_elsewhere(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from neureasoner import models

    plain = check_model(folder, "cpu")
    load = models.load

    def offloaded(name: str, *_: Any) -> Any:
        return load(name, device_map={"model": "disk", "lm_head": "cpu"})

    monkeypatch.setattr(models, "load", offloaded)
    found = check_model(folder)
    assert found["device"] == "cpu, disk" and found["fingerprint"] == plain["fingerprint"]
    assert found["hooks_fire"] and found["left_padding"]["consistent"]
