"""AdapterLM: tasks of lm-evaluation-harness on a steered model. Most of it needs the harness installed."""

from __future__ import annotations

import builtins
import importlib
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.inference.steered import SteeredModel

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install 'neureasoner[harness]'")


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_harness(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "neureasoner.evaluation.adapter_lm", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_harness)
    module = importlib.import_module("neureasoner.evaluation.adapter_lm")
    sys.modules.pop(module.__name__)  # the next to import it gets it whole
    with pytest.raises(UserError, match=r"pip install 'neureasoner\[harness\]'"):
        module.AdapterLM("tiny-steered")


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture
def lm(checkpoint: Path) -> Any:
    from neureasoner.evaluation.adapter_lm import AdapterLM

    return AdapterLM(checkpoint / "model", batch_size=3, max_gen_toks=100, device="cpu")


@needs_harness
def test_text_is_that_of_the_steered_model(lm: Any, checkpoint: Path) -> None:
    """The same tokens as SteeredModel.generate, thinking and stop texts cut off; order kept; forced tokens counted."""
    prompts = [f"Calculate {n} + 2." for n in range(5)]
    texts = [lm.apply_chat_template([{"role": "user", "content": p}]) for p in prompts]
    model = SteeredModel.from_pretrained(checkpoint / "model", device="cpu")
    for each in (model, lm.model):  # the thinking is closed at its third step, always
        for name, probe in each.probes.items():
            probe.threshold = 0.0 if name == "probes/instance" else 1.1
    answers = lm.generate_until([request(t, {"until": []}) for t in texts], disable_tqdm=True)
    expected = model.generate(prompts, max_new_tokens=100, temperature=0, batch_size=3)
    for answer, generation in zip(answers, expected, strict=True):
        _, closed, after = generation.text.partition("</think>")
        assert answer == (after.split("<|im_end|>")[0].lstrip() if closed else "")
    assert any(g.triggers for g in expected)
    assert any(answers)
    assert lm.counts == {
        "responses": 5,
        "tokens": sum(len(g.response_ids) for g in expected),
        "forced": sum(sum(g.forced) for g in expected),
        "interventions": sum(g.triggers for g in expected),
        "cut_off": sum(not g.finished for g in expected),
    }


@needs_harness
def test_stop_texts_count_after_the_thinking_only(lm: Any) -> None:
    def answer(text: str, prompt: str, stops: list[str], finished: bool = True) -> str:
        ids = lm.tok_encode(text)
        generation = SimpleNamespace(text=text, prompt_ids=lm.tok_encode(prompt), response_ids=ids, finished=finished)
        return str(lm._answer(generation, stops))

    assert answer("One.\n\nTwo.\n</think>\n\nIt is 5.\n\nQ: next", "<think>\n", ["\n\n"]) == "It is 5."
    assert answer("One.\n\nTwo.\n</think>\n\nIt is 5.\n\nQ: next", "<think>\n", ["Q:"]) == "It is 5.\n\n"
    assert answer("One.\n\nTwo.", "<think>\n", ["\n\n"]) == ""  # cut off in its thought
    assert answer("<think>\nOne.", "A:", []) == ""
    assert answer(" 5\nQ: next", "A:", ["Q:", "\n"]) == " 5"  # no thought at all: a base model, a plain prompt
    assert answer(" 5<|im_end|>", "A:", []) == " 5"
    assert answer("It is </think>, I think.<|im_end|>", "<think>\n\n</think>\n\n", []) == "It is </think>, I think."
    assert answer("One.\n</think>\n\nThe tag </think> ends it.", "What is </think>?<think>\n", []) == (
        "The tag </think> ends it."
    )
    assert answer("No tag such as <think> here.", "What does </think> mean?\nA:", []) == "No tag such as <think> here."


@needs_harness
@pytest.mark.parametrize("end", ["<|pad|>", "<|im_end|>"])
def test_every_end_of_the_models_list_is_cut_off_at_the_end_alone(lm: Any, end: str, monkeypatch: Any) -> None:
    listed = lm.tokenizer.convert_tokens_to_ids(["<|pad|>", "<|im_end|>"])
    monkeypatch.setattr(lm.model.model.generation_config, "eos_token_id", listed)
    prompt = lm.tok_encode("<think>\nOkay.\n</think>\n\n")
    text = f"Write {end} to end it.{end}"
    ids = lm.tok_encode(text)
    assert lm.tokenizer.decode(ids) == text and ids[-1] in listed
    for finished, expected in ((True, text.removesuffix(end)), (False, text)):
        generation = SimpleNamespace(text=text, prompt_ids=prompt, response_ids=ids, finished=finished)
        assert lm._answer(generation, []) == expected


@needs_harness
def test_requests_of_unlike_settings_keep_their_order(lm: Any) -> None:
    calls: list[tuple[int, dict[str, Any]]] = []

    def generate(prompts: Any, **settings: Any) -> list[Any]:
        calls.append((len(prompts), settings))
        rows = [
            SimpleNamespace(text=lm.tokenizer.decode(p), prompt_ids=p, response_ids=p, forced=[], triggers=0)
            for p in prompts
        ]
        for row in rows:
            row.finished = True
        return rows

    lm.model = SimpleNamespace(generate=generate, model=lm.model.model)
    asked = [
        ("one", {}),
        ("two", {"max_gen_toks": 7, "do_sample": True, "temperature": 0.5}),
        ("three", {"until": "e"}),
    ]
    assert lm.generate_until([request(*a) for a in asked], disable_tqdm=True) == ["one", "two", "thr"]
    settings = sorted((n, s["max_new_tokens"], s["temperature"], s["top_p"]) for n, s in calls)
    assert settings == [(1, 7, 0.5, 1.0), (2, 100, 0.0, 1.0)]


@needs_harness
def test_a_setting_that_cannot_be_kept_is_named(lm: Any) -> None:
    with pytest.raises(UserError, match="generation setting 'num_beams'"):
        lm.generate_until([request("x", {"num_beams": 4})], disable_tqdm=True)
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        lm.generate_until([request("x", {"max_gen_toks": 10**6})], disable_tqdm=True)
    with pytest.raises(TypeError, match="preTrained"):
        type(lm)(preTrained="x")


def slow_log_p(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One forward per token, in float64."""
    ids, total, greedy = list(context), 0.0, True
    for token in continuation:
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        total += float(logits[token] - logits.logsumexp(-1))
        greedy &= int(logits.argmax()) == token
        ids.append(token)
    return total, greedy


@needs_harness
def test_log_likelihoods_are_the_plain_models(lm: Any) -> None:
    model = lm.model.model
    pairs = [("Tom has 3 apples", " and buys 14 more."), ("", "None."), ("The answer ", "is 7"), ("a", "b c d e f g")]
    found = lm.loglikelihood([request(*p) for p in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        a = lm.tok_encode(context.rstrip()) or [lm.eot_token_id]
        b = lm.tok_encode(context + continuation)[len(a) if context else 0 :]
        expected, best = slow_log_p(model, a, b)
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy is best
    ids = lm.tok_encode("Calculate")
    with torch.inference_mode():
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    assert lm._loglikelihood_tokens([(("", ""), ids, [best]), (("", ""), ids, [best + 1])])[0][1] is True
    assert lm._loglikelihood_tokens([(("", ""), ids, [best]), (("", ""), ids, [best + 1])])[1][1] is False


@needs_harness
def test_log_likelihoods_of_weights_that_lie_elsewhere(lm: Any) -> None:
    from accelerate import cpu_offload

    asked = [request("Tom has 3 apples", " and buys 14 more."), request("a", "b c")]
    expected = lm.loglikelihood(asked, disable_tqdm=True)
    cpu_offload(lm.model.model, execution_device=torch.device("cpu"))
    assert lm.loglikelihood(asked, disable_tqdm=True) == expected


@needs_harness
def test_rolling_log_likelihood_is_that_of_the_whole_text(lm: Any) -> None:
    text = "Okay, let me think about 12 + 30 = 42."
    expected, _ = slow_log_p(lm.model.model, [lm.eot_token_id], lm.tok_encode(text))
    assert lm.loglikelihood_rolling([request(text)])[0] == pytest.approx(expected, abs=1e-4)


@needs_harness
def test_a_task_runs_unchanged_from_a_file(lm: Any, tmp_path: Path, make_task: Callable[..., Any]) -> None:
    """Golds are what the model says, worked out here, for three of four rows: so accuracy is 3/4 and nothing else."""
    import lm_eval

    questions = [f"Calculate {i} + {7 + i}." for i in range(4)]
    for name, probe in lm.model.probes.items():  # the thinking is closed at its third step, always
        probe.threshold = 0.0 if name == "probes/instance" else 1.1
    golds, labels = [], []
    for question in questions:
        [said] = lm.model.generate([question], max_new_tokens=100, temperature=0)
        golds.append(said.text.partition("</think>")[2].split("<|im_end|>")[0].lstrip().split("\n\n")[0])
        prompt = lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": question}]))
        scores = [slow_log_p(lm.model.model, prompt, lm.tok_encode(choice))[0] for choice in ("5", "6")]
        labels.append(int(scores[1] > scores[0]))
    assert sum(map(bool, golds)) >= 2
    golds[3], labels[3] = "something else", 1 - labels[3]
    tasks = make_task(questions, golds, labels)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=["sums", "choice"], task_manager=tasks, apply_chat_template=True, bootstrap_iters=0, limit=4
    )
    assert results["results"]["sums"]["exact_match,none"] == 0.75
    assert results["results"]["choice"]["acc,none"] == 0.75
    assert results["config"]["neureasoner_rules"] == ["instance", "inter", "intra"]
    assert results["config"]["neureasoner_counts"]["responses"] == 4
    assert "plain model" in results["config"]["loglikelihood"]


@pytest.fixture
def make_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A task that generates and one that compares likelihoods, on a local file."""

    def make(questions: list[str], golds: list[str], labels: list[int]) -> Any:
        from lm_eval.tasks import TaskManager

        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        columns = zip(questions, golds, labels, strict=True)
        rows = [{"question": q, "answer": g, "label": label} for q, g, label in columns]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        common = (
            f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'rows.jsonl'}}}\n"
            'test_split: test\ndoc_to_text: "{{question}}"\n'
        )
        (tmp_path / "sums.yaml").write_text(
            f'task: sums\n{common}output_type: generate_until\ndoc_to_target: "{{{{answer}}}}"\n'
            'generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 100}\n'
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        )
        (tmp_path / "choice.yaml").write_text(
            f'task: choice\n{common}output_type: multiple_choice\ndoc_to_choice: ["5", "6"]\ndoc_to_target: label\n'
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )
        return TaskManager(include_path=str(tmp_path), include_defaults=False)

    return make
