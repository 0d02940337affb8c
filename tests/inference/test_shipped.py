"""The released steered checkpoint: it loads with and without us, and its probes are its own."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neureasoner.inference import SteeredModel
from neureasoner.model_files import resolve
from neureasoner.traces import FINISHED, INTER, INTRA

EASY = "Calculate 12 + 4 * 9."


def test_plain_transformers_loads_it_and_knows_the_triggers() -> None:
    folder = resolve("tiny-steered")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert [len(tokenizer.encode(t, add_special_tokens=False)) for t in (INTRA, INTER)] == [1, 1]
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)


def test_it_is_steered_by_its_own_plan() -> None:
    model = SteeredModel.from_pretrained("tiny-steered")  # refuses probes of another model
    assert {rule.name for rule in model.plan.rules} == {"instance", "inter", "intra"}
    (generation,) = model.generate([EASY], max_new_tokens=300, temperature=0.0)
    assert generation.text.count("\\boxed{48}") == 1


def test_a_forced_trigger_starts_a_diagnosis() -> None:
    """After a wrong step and the trigger, the fine-tuned model names the error and repairs it."""
    folder = resolve("tiny-steered")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": EASY}], tokenize=False, add_generation_prompt=True
    )
    wrong = "The task is 12 + 4 * 9.\n\nFirst the products, then the rest.\n\n4 * 9 = 38. Now I have 12 + 38.\n\n"
    ids = tokenizer(prompt + wrong + INTRA, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=300, do_sample=False)
    said = tokenizer.decode(out[0, ids.shape[1] :])
    assert said.startswith("\n[FAILURE_INTRA]") and "4 * 9 = 38" in said.split("\n\n")[0]
    assert "\\boxed{48}" in said and FINISHED not in said
