"""The steered checkpoint: assembled, loaded plainly and steered, and shown by ``generate``."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.artifacts import file_fingerprint
from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference.assemble import assemble
from neureasoner.inference.config import AssembleConfig, GenerateConfig
from neureasoner.inference.controls import no_op
from neureasoner.inference.generate import describe, generate
from neureasoner.inference.plan import Plan
from neureasoner.inference.steered import SteeredModel, encode_prompt
from neureasoner.models import fingerprint
from neureasoner.probes.detectors.gate import FailureGate
from neureasoner.probes.detectors.probe import Probe
from neureasoner.probes.detectors.sequential import Sequential
from neureasoner.probes.features import FeatureSet
from neureasoner.traces import NO_THINKING, Problem, read_traces, write_rows

SHIPPED = Path(__file__).parents[2] / "configs" / "plans" / "neureasoner.yaml"
QUESTIONS = ["12 + 30?", "Try 3 * 8 - 5 and tell me.", "Done?"]


def write_probe(folder: Path, level: str, model: Any, name: str = "entropy", window: int = 4, threshold: float = 0.0):
    """A real probe of noise; with threshold 0 it fires whenever its window is valid."""
    features = FeatureSet.named(name, level, window, channels="neuron:1[3,5]", residual="residual:0")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, features.dim(32))), np.arange(24) % 2
    probe = Probe(features, model="m", model_fingerprint=fingerprint(model), hidden=8, epochs=1).fit(x, y)
    probe.threshold = threshold
    probe.save(folder)


@pytest.fixture(scope="module")
def base(make_model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model folder whose tokenizer has the triggers."""
    folder = tmp_path_factory.mktemp("base")
    model = make_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def probes(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    write_probe(folder / "intra", "intra", make_model(), "entropy+residual")
    write_probe(folder / "instance", "instance", make_model(), "spectral", window=2)
    write_probe(folder / "paper" / "intra", "intra", make_model(), "spectral")
    return folder


@pytest.fixture(scope="module")
def checkpoint(base: Path, probes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "steered"
    with pytest.warns(UserWarning, match="rule inter is dropped: its probe .*inter does not exist"):
        summary = assemble(AssembleConfig(model=str(base), probes=str(probes), out=str(out), plan=str(SHIPPED)))
    assert summary["rules"] == ["instance", "intra"] and len(summary["dropped"]) == 1
    return out


def test_a_steered_checkpoint_is_a_plain_model_folder_too(checkpoint, base, make_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert fingerprint(model) == fingerprint(make_model())
    assert AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids("<INTRA>") > 0
    files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert {"plan.yaml", "neureasoner.json", "stage.json", "probes/paper/intra/probe.json"} <= files
    assert "stage.started.json" not in files and not any(f.endswith((".bin", ".pt", ".pkl")) for f in files)
    card = json.loads((checkpoint / "neureasoner.json").read_text())
    assert card["probes"]["probes/instance"]["window"] == 2 and card["fingerprint"] == fingerprint(model)
    assert not list(checkpoint.parent.glob(".*")), "nothing is left beside it"


def test_promise_9_assembling_again_says_done_and_other_settings_are_refused(checkpoint, base, probes, recwarn):
    config = AssembleConfig(model=str(base), probes=str(probes), out=str(checkpoint), plan=str(SHIPPED))
    before = os.stat(checkpoint / "plan.yaml").st_mtime_ns
    assert assemble(config)["rules"] == ["instance", "intra"]
    assert os.stat(checkpoint / "plan.yaml").st_mtime_ns == before
    with pytest.raises(UserError, match="holds the output of other settings"):
        assemble(
            AssembleConfig(model=str(base), probes=str(probes), out=str(checkpoint), plan=str(SHIPPED), base=str(base))
        )
    with pytest.raises(UserError, match="holds other files"):
        assemble(AssembleConfig(model=str(base), probes=str(probes), out=str(base), plan=str(SHIPPED)))


def test_promise_9_a_killed_assemble_leaves_no_half_checkpoint(base, probes, tmp_path, monkeypatch):
    config = AssembleConfig(model=str(base), probes=str(probes), out=str(tmp_path / "s"), plan=str(SHIPPED))
    with monkeypatch.context() as m:
        m.setattr(Plan, "save", lambda self, path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.warns(UserWarning), pytest.raises(KeyboardInterrupt):
            assemble(config)
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning):
        assemble(config)
    assert SteeredModel.from_pretrained(tmp_path / "s").plan.names == ["instance", "intra"]


@pytest.mark.parametrize("rule", [None, Sequential("ewma", alpha=0.4), Sequential("consecutive", m=2)])
def test_steered_generation_online_scores_equal_offline_scores(checkpoint, rule):
    """The probe gives the same number while decoding as on the finished trace, and so does its decision rule."""
    steered = SteeredModel.from_pretrained(checkpoint, device="cpu")
    assert steered.plan.rule("instance").trigger.at_step == 2
    plan = steered.plan.select(["intra"]).replace_triggers({"intra": {"threshold": math.nextafter(1.0, 0.0)}})
    quiet = steered.with_plan(plan)
    quiet.probes["probes/intra"].rule = rule
    sites = ["logits", "residual:0"]
    out = quiet.generate(QUESTIONS * 2, temperature=1.5, max_new_tokens=300, record=sites, seed=2)
    probe, checked = quiet.probes["probes/intra"], 0
    for g in out:
        assert g.triggers == 0
        ends = [0, *(s.token_end for s in g.steps if s.closed)]
        plain = []
        for step in range(len(ends) - 1):
            x, valid = probe.features.compute(g.series, ends[: step + 2])
            plain.append(float(probe.predict_proba(x[None])[0]) if valid else -np.inf)
        want = np.array(plain) if rule is None else rule.apply(np.array(plain), np.zeros(len(plain), dtype=int))
        for score in g.scores:
            assert score["score"] == pytest.approx(want[score["step"]], abs=1e-9)
        checked += len(g.scores)
    assert checked >= 3


def test_steered_generation_is_reproducible_and_batched_in_order(checkpoint):
    steered = SteeredModel.from_pretrained(checkpoint, device="cpu")
    seen: list[tuple[int, int]] = []
    settings: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 200, "batch_size": 2, "seed": 5}
    first = steered.generate(QUESTIONS, progress=lambda d, t: seen.append((d, t)), **settings)
    again = steered.generate(QUESTIONS, **settings)
    assert [g.response_ids for g in first] == [g.response_ids for g in again]
    assert [g.events for g in first] == [g.events for g in again] and seen == [(2, 3), (3, 3)]
    assert first[0].prompt_ids == encode_prompt(steered.tokenizer, QUESTIONS[0])
    twice = steered.generate([QUESTIONS[0]] * 4, **settings)
    assert len({tuple(g.response_ids) for g in twice}) == 4, "batches and rows draw differently"


def test_prompts_in_every_form(checkpoint):
    tokenizer = SteeredModel.from_pretrained(checkpoint, device="cpu").tokenizer
    question = QUESTIONS[0]
    ids = encode_prompt(tokenizer, question)
    assert ids == encode_prompt(tokenizer, Problem("a", "f", 1, question, "42"))
    assert ids == encode_prompt(tokenizer, [{"role": "user", "content": question}]) == encode_prompt(tokenizer, ids)
    closed = encode_prompt(tokenizer, question, nothinking=True)
    assert tokenizer.decode(closed).endswith("<think>\n" + NO_THINKING)


def test_streaming_shows_the_same_text_and_what_was_forced(checkpoint):
    steered = SteeredModel.from_pretrained(checkpoint, device="cpu")
    plan = steered.plan.select(["intra"]).replace_triggers({"intra": {"always": True, "immediate": True}})
    pieces: list[tuple[str, bool]] = []
    [g] = steered.with_plan(plan).generate(
        QUESTIONS[:1], temperature=1.0, max_new_tokens=40, on_text=lambda text, forced: pieces.append((text, forced))
    )
    assert "".join(text for text, _ in pieces) == g.text.removesuffix(steered.tokenizer.eos_token)
    assert [text for text, forced in pieces if forced] == ["<INTRA>"] * g.triggers and g.triggers > 1


def test_an_empty_plan_is_the_plain_model(checkpoint, kit):
    steered = SteeredModel.from_pretrained(checkpoint, Plan("vanilla"), device="cpu")
    out = steered.generate(QUESTIONS, temperature=0.0, max_new_tokens=30)
    ids = [encode_prompt(steered.tokenizer, q) for q in QUESTIONS]
    plain = kit.sample(steered.model, steered.tokenizer, ids, max_new_tokens=30)
    assert [g.response_ids for g in out] == [g.response_ids for g in plain]


def test_the_paper_arm_reads_the_papers_probes(checkpoint):
    paper = SteeredModel.from_pretrained(checkpoint, device="cpu").paper()
    assert paper.plan.names == ["intra"] and paper.plan.probe_paths == ["probes/paper/intra"]
    assert paper.probes["probes/paper/intra"].features.name == "spectral"


def test_bad_input_is_named(checkpoint, base, probes, make_model, tiny_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"holds no plan.yaml, so it is not a steered checkpoint"):
        SteeredModel.from_pretrained(base)
    plan = Plan.load(SHIPPED)
    with pytest.raises(UserError, match=r"names probe probes/inter, but .*probe.json does not exist"):
        SteeredModel.from_pretrained(checkpoint, Plan(plan.name, plan.rules, checkpoint))
    other = make_model(seed=9)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    config = {"probes": str(probes), "plan": str(SHIPPED)}
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"fitted on model 'm'.*this one is"):
        assemble(AssembleConfig(model=str(tmp_path / "other"), out=str(tmp_path / "a"), **config))
    with pytest.warns(UserWarning), pytest.raises(UserError, match="<INTRA> that the tokenizer lacks"):
        assemble(AssembleConfig(model=str(tmp_path / "other"), out=str(tmp_path / "a"), base=str(base), **config))
    assert not (tmp_path / "a").exists()


def test_probes_of_the_base_are_welcome_on_the_trained_model(base, probes, make_model, tokenizer, tmp_path):
    trained = make_model(seed=9)
    trained.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    config = AssembleConfig(str(tmp_path / "sft"), str(probes), str(tmp_path / "s"), str(SHIPPED), str(base))
    with pytest.warns(UserWarning):
        assemble(config)
    steered = SteeredModel.from_pretrained(tmp_path / "s", device="cpu")
    assert len(steered.generate(QUESTIONS, max_new_tokens=8)) == 3
    assert steered.with_plan(steered.plan.select(["intra"])).plan.names == ["intra"]


def test_generate_shows_and_writes_traces(checkpoint, tmp_path, capsys):
    config = GenerateConfig(
        str(checkpoint), prompt=QUESTIONS[:2], samples=2, max_new_tokens=40, temperature=1.0, out=str(tmp_path / "g")
    )
    summary = generate(config)
    traces = read_traces(tmp_path / "g" / "traces.jsonl")
    assert summary["n"] == len(traces) == 4 and traces[1].id == "prompt-0#1"
    assert traces[0].meta["plan"]["name"] == "neureasoner" and traces[0].meta["seed"] == 0
    assert QUESTIONS[0] in capsys.readouterr().out
    assert generate(config) == summary and "done already" in capsys.readouterr().out
    problems = tmp_path / "p.jsonl"
    write_rows(problems, [Problem("a", "f", 1, QUESTIONS[0], "42")])
    streamed = GenerateConfig(str(checkpoint), problems=str(problems), max_new_tokens=20, rules=["none"])
    assert generate(streamed)["triggers_per_trace"] == 0 and "see nothing" not in capsys.readouterr().out
    closed = GenerateConfig(str(checkpoint), prompt=QUESTIONS[:1], max_new_tokens=5, nothinking=True)
    assert generate(closed)["triggers_per_trace"] == 0
    assert "so these rules see nothing: instance," in capsys.readouterr().out
    with pytest.raises(UserError, match="either 'prompt'"):
        GenerateConfig(str(checkpoint))


def test_the_room_exports_lazily():
    code = "import sys, neureasoner.inference.config; assert 'torch' not in sys.modules; "
    code += "from neureasoner.inference import SteeredModel; print(SteeredModel.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SteeredModel"


@pytest.fixture
def steering(make_model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """A model, and a plan with its direction and gate beside it, in one folder each."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    mark = fingerprint(model)
    values = {"neuron:1[3,5]": torch.tensor([40.0, -40.0]), "residual:0": torch.ones(32)}
    Direction(values, "positive = towards right traces", "m", mark).save(tmp_path / "directions/adaras")
    rng = np.random.default_rng(0)
    gate = FailureGate(np.array([[0, 1], [1, 2]]), model="m", model_fingerprint=mark, hidden=4, epochs=1)
    gate.fit([rng.normal(size=(4, 2)) for _ in range(6)], np.arange(6) % 2)
    gate.threshold = -1.0  # every question is expected to fail
    gate.save(tmp_path / "gates/adaras")
    shutil.copy(SHIPPED.parent / "adaras.yaml", tmp_path / "plan.yaml")
    return tmp_path


def test_a_steered_checkpoint_carries_its_directions_and_gates(steering, tmp_path):
    config = AssembleConfig(str(steering / "model"), out=str(tmp_path / "s"), plan=str(steering / "plan.yaml"))
    summary = assemble(config)
    assert summary["rules"] == ["adaras"] and summary["others"] == ["directions/adaras", "gates/adaras"]
    card = json.loads((tmp_path / "s/neureasoner.json").read_text())
    assert card["directions"]["directions/adaras"]["meaning"] == "positive = towards right traces"
    files = [steering / "gates/adaras" / f for f in ("gate.json", "gate.safetensors")]
    assert card["gates"]["gates/adaras"] == {"threshold": -1.0, "channels": 2, "files": file_fingerprint(files)}
    shutil.rmtree(steering / "directions")
    shutil.rmtree(steering / "gates")
    steered = SteeredModel.from_pretrained(tmp_path / "s", device="cpu")
    out = steered.generate(QUESTIONS, max_new_tokens=12, temperature=0.0)
    assert [[e["rule"] for e in g.events] for g in out] == [["adaras"]] * 3
    plain = steered.with_plan(Plan("none", folder=steered.plan.folder))
    assert [g.response_ids for g in plain.generate(QUESTIONS, max_new_tokens=12, temperature=0.0)] != [
        g.response_ids for g in out
    ]
    still = steered.with_plan(no_op(steered.plan)).generate(QUESTIONS, max_new_tokens=12, temperature=0.0)
    assert [g.response_ids for g in still] == [
        g.response_ids for g in plain.generate(QUESTIONS, max_new_tokens=12, temperature=0.0)
    ]
    moved = steered.with_plan(steered.plan, {"directions/adaras": -steered.directions["directions/adaras"]})
    assert moved.directions["directions/adaras"].meaning.startswith("flipped") and moved.gates is not steered.gates


def test_directions_and_gates_may_lie_elsewhere_and_changed_ones_are_another_checkpoint(steering, tmp_path):
    shutil.move(steering / "directions/adaras", steering / "rcn")
    shutil.move(steering / "gates", steering / "fitted")
    config = {
        "model": str(steering / "model"),
        "plan": str(steering / "plan.yaml"),
        "directions": str(steering / "rcn"),
        "gates": str(steering / "fitted"),
        "out": str(tmp_path / "s"),
    }
    assemble(AssembleConfig(**config))
    assert (tmp_path / "s/directions/adaras/direction.json").is_file()
    assert (tmp_path / "s/gates/adaras/gate.safetensors").is_file()
    direction = Direction.load(steering / "rcn")
    direction.scaled(2.0).save(steering / "rcn")
    with pytest.raises(UserError, match="holds the output of other settings or inputs"):
        assemble(AssembleConfig(**config))


def test_what_a_plan_names_and_does_not_get_is_named(steering, make_model, tokenizer, tmp_path):
    config = {"model": str(steering / "model"), "plan": str(steering / "plan.yaml"), "out": str(tmp_path / "s")}
    text = (steering / "plan.yaml").read_text()
    other = steering / "other.yaml"
    other.write_text(text.replace("directions/adaras", "vectors/adaras"))
    with pytest.raises(UserError, match="vectors/adaras must lie under directions/ in a checkpoint"):
        assemble(AssembleConfig(**config | {"plan": str(other)}))
    other.write_text(text.replace("gates/adaras", "gates/none"))
    with pytest.raises(UserError, match=r"names gates/none, but it is not in .*gates/none; say where"):
        assemble(AssembleConfig(**config | {"plan": str(other)}))
    with pytest.raises(UserError, match=r"names gate gates/none: .*holds no gate.json"):
        SteeredModel.from_pretrained(steering / "model", other, device="cpu")
    with pytest.raises(UserError, match=r"names probe probes/instance, .* give the folder of `probes fit`"):
        assemble(AssembleConfig(**config | {"plan": str(SHIPPED)}))
    with pytest.raises(UserError, match="key 'out' is empty"):
        AssembleConfig("m")
    trained = make_model(seed=4)
    with pytest.raises(UserError, match=r"was fitted on model 'm'"):
        SteeredModel(trained, tokenizer, Plan.load(steering))
    assert (
        SteeredModel(trained, tokenizer, Plan.load(steering), accept=[fingerprint(make_model())]).plan.name == "adaras"
    )
    shutil.rmtree(steering / "gates")
    other.write_text(text.replace("gate: gates/adaras, ", ""))
    with pytest.raises(UserError, match="was made on model 'm'"):
        SteeredModel(trained, tokenizer, Plan.load(other))
    assert not (tmp_path / "s").exists()


def test_a_threshold_no_probability_exceeds_is_refused(checkpoint, tmp_path):
    plan = Plan.load(checkpoint)
    name = next(r.name for r in plan.rules if r.trigger.probe is not None)
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    plan.replace_triggers({name: {"threshold": 1.0}}).save(folder / "plan.yaml")
    with pytest.raises(UserError, match=f"rule {name} can never fire: the score of .* is a probability"):
        SteeredModel.from_pretrained(folder)


def test_a_probes_own_threshold_of_one_is_refused(checkpoint):
    steered = SteeredModel.from_pretrained(checkpoint, device="cpu")
    name = next(r.name for r in steered.plan.rules if r.trigger.probe is not None)
    with pytest.raises(UserError, match=f"rule {name} can never fire: .* never above the threshold 1.5"):
        steered.with_plan(steered.plan.replace_triggers({name: {"threshold": 1.5}}))
    probe = steered.probes[steered.plan.rule(name).trigger.probe]
    probe.threshold = 1.0
    with pytest.raises(UserError, match=f"rule {name} can never fire: .* never above its own threshold 1.0"):
        steered.with_plan(steered.plan)


def test_an_infinite_threshold_watches_and_never_acts(checkpoint):
    steered = SteeredModel.from_pretrained(checkpoint, device="cpu")
    changes = {r.name: {"threshold": float("inf")} for r in steered.plan.rules if r.trigger.probe is not None}
    watched = steered.with_plan(steered.plan.select(changes).replace_triggers(changes))
    how = {"max_new_tokens": 60, "temperature": 1.0, "seed": 2}
    questions = ["12 + 30?", "Try 3 * 8 - 5 and tell me."]
    seen = watched.generate(questions, **how)
    plain = steered.with_plan(Plan("none")).generate(questions, **how)
    assert [g.response_ids for g in seen] == [g.response_ids for g in plain]
    assert any(g.scores for g in seen) and not any(g.events for g in seen)


def test_the_tokenizer_of_another_model_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="its tokenizer is not the one that it was assembled with"):
        SteeredModel.from_pretrained(folder)


def test_small_files_are_read_before_the_model(checkpoint, tmp_path, monkeypatch):
    from neureasoner import models

    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    probe = next(r.trigger.probe for r in Plan.load(folder).rules if r.trigger.probe is not None)
    (folder / probe / "probe.json").unlink()
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    with pytest.raises(UserError, match=r"probe.json does not exist"):
        SteeredModel.from_pretrained(folder)


def test_a_rule_that_waits_longer_than_the_response_may_be_is_refused(checkpoint):
    steered = SteeredModel.from_pretrained(checkpoint, device="cpu")
    plan = steered.plan.select(["intra"]).replace_triggers({"intra": {"min_steps": 30}})
    with pytest.raises(UserError, match=r"rule intra can never fire: .* max_new_tokens \(30\)"):
        steered.with_plan(plan).generate(QUESTIONS, max_new_tokens=30)


def test_an_effect_is_told_in_words():
    effect = {"step": 0, "token": 0, "rule": "adaras", "score": 0.8, "threshold": 0.5, "action": "add"}
    effect |= {"suppressed": False, "row": 1, "strength": 0.3, "tokens": 40}
    assert describe(effect) == "from the start: adaras, score 0.80 > 0.50, add of strength 0.3 on 40 tokens"
