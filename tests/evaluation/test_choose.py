"""``choose``: thresholds by share, what is taken over and what is drawn, the search, its artifacts, refusals."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.artifacts import read_json, write_json
from neureasoner.data_builders.problem_file import make_problems
from neureasoner.errors import UserError
from neureasoner.evaluation.choose import _beats, check_unseen, choose
from neureasoner.evaluation.choose_config import ChooseConfig
from neureasoner.evaluation.choose_search import PLAN_LESS, Run, Search, Setting, threshold_at
from neureasoner.evaluation.metrics import Outcome
from neureasoner.evaluation.runner import batch_seed
from neureasoner.inference.config import AssembleConfig
from neureasoner.inference.plan import Plan
from neureasoner.inference.steered import SteeredModel, assemble
from neureasoner.models import fingerprint, load
from neureasoner.traces import read_traces, write_rows

CAP = 40


@pytest.fixture(scope="session")
def ending(tmp_path_factory: Any, checkpoint: Path) -> Path:
    """The steered checkpoint, trained on to end its answers: its probes are of the model that it was trained from."""
    folder: Path = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(checkpoint / "model", folder)
    model, tokenizer = load(str(folder), device="cpu")
    origin = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 4.5
    model.save_pretrained(folder)
    write_json(folder / "neureasoner.json", {"base": str(checkpoint / "model"), "base_fingerprint": origin})
    return folder


@pytest.fixture(scope="session")
def validation(tmp_path_factory: Any) -> Path:
    file: Path = tmp_path_factory.mktemp("choose") / "validation.jsonl"
    write_rows(file, make_problems(["arithmetic", "words"], 8, "validation", 3))
    return file


@pytest.fixture
def config(ending: Path, validation: Path, tmp_path: Path) -> Callable[..., ChooseConfig]:
    def make(**changes: Any) -> ChooseConfig:
        fixed: dict[str, Any] = {
            "model": str(ending),
            "problems": str(validation),
            "out": str(tmp_path / "out"),
            "price": 0.5,
            "grid": ["50%"],
            "thresholds": {"inter": ["0.4"], "instance": ["30%", "own"]},
            "min_steps": {"intra": [0, 4]},
            "samples": 1,
            "max_new_tokens": CAP,
            "temperature": 1.0,
            "batch_size": 5,
            "resamples": 200,
            "device": "cpu",
        }
        return ChooseConfig(**(fixed | changes))

    return make


def test_a_threshold_by_share_is_exceeded_by_that_share() -> None:
    rng = np.random.default_rng(0)
    scores = [*rng.random(60), *[-np.inf] * 40]
    for share in (0.01, 0.1, 0.25, 0.6):
        threshold = threshold_at(share, scores)
        assert threshold is not None and sum(s > threshold for s in scores) == round(share * 100)
    everywhere = threshold_at(0.9, scores)
    assert everywhere is not None and sum(s > everywhere for s in scores) == 60, "no more than have a score"
    assert threshold_at(0.5, [-np.inf] * 3) is None


def test_stage_end_to_end(config: Callable[..., ChooseConfig], ending: Path, capsys: Any, monkeypatch: Any) -> None:
    settings, original, made = config(), Run._generate, Counter[tuple[str, int, int]]()

    def counted(self: Run, sample: int, batch: int, vote: int) -> Any:
        made[self.arm.name, sample, batch] += 1
        if sum(made.values()) in (3, 11):
            raise KeyboardInterrupt
        return original(self, sample, batch, vote)

    monkeypatch.setattr(Run, "_generate", counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            choose(settings)
    capsys.readouterr()
    summary = choose(settings)
    assert sorted(made.values()) == [1] * (len(made) - 2) + [2, 2], "a kill costs the batch at work, and no other"
    out, said = Path(settings.out), capsys.readouterr().out
    found = read_json(out / "choice.json")
    by_name = {c["name"]: c for c in found["candidates"]}
    assert "2 of intra alone" in said and "8 problems × 1 samples" in said and (out / "frontier.png").is_file()
    assert {tuple(c["rules"]) for c in by_name.values()} >= {
        (), ("instance",), ("inter",), ("intra",), ("instance", "inter", "intra"), ("instance", "inter"),
        ("instance", "intra"), ("inter", "intra"),
    }  # fmt: skip

    # every candidate is the plan it says, run without taking anything over
    plain = read_traces(out / "traces" / f"{PLAN_LESS}.jsonl")
    assert not any(t.events for t in plain) and any(t.meta["scores"] for t in plain)
    steered, plan = SteeredModel.from_pretrained(ending, device="cpu"), Plan.load(ending)
    acted = 0
    for name, c in by_name.items():
        changes = {r: {k: v for k, v in s.items() if k != "asked"} for r, s in c["rules"].items()}
        model = steered.with_plan(plan.select(changes).replace_triggers(changes))
        traces = read_traces(out / "traces" / f"{name}.jsonl")
        for start, end in ((0, 5), (5, 8)):
            part = traces[start:end]
            seed = batch_seed(0, 0, start // 5)
            again = model.generate([t.problem for t in part], max_new_tokens=CAP, temperature=1.0, seed=seed)
            assert [g.response_ids for g in again] == [t.response_ids for t in part], name
        acted += sum(bool(t.events) for t in traces)
        changed = sum(t.response_ids != p.response_ids for t, p in zip(traces, plain, strict=True))
        if c["rules"]:
            assert changed <= c["drawn"] <= 8
            right = np.mean([bool(t.labels and t.labels.correct and t.finished) for t in traces])
            tokens = [np.mean([len(t.response_ids) if t.finished else CAP for t in ts]) for ts in (traces, plain)]
            assert c["utility"] == pytest.approx(100 * right - 0.5 * 100 * tokens[0] / tokens[1])
            assert c["utility_gain"] == pytest.approx(c["utility"] - by_name[PLAN_LESS]["utility"])
            low, high = c["utility_gain_ci"]
            assert low <= c["utility_gain"] <= high
    assert len({len(t.response_ids) for t in plain}) > 4, "the fixture should end at times"
    assert acted and sum(c["drawn"] for c in by_name.values()) < 8 * len(by_name), "some are taken over"

    # the chosen one is the best; each of its rules stays because the plan without it is worth less
    chosen = by_name[found["chosen"]]
    assert chosen["utility"] == max(c["utility"] for c in by_name.values()) and summary["chosen"] == chosen["name"]
    for rule in found["rules"]:
        assert rule["kept"] == (rule["rule"] in chosen["rules"])
        gain = by_name[rule["with"]]["utility"] - by_name[rule["without"]]["utility"]
        assert rule["gain"] == pytest.approx(gain) and (rule["gain"] > 0 if rule["kept"] else rule["gain"] <= 0)
        assert f"- {rule['rule']} is {'kept' if rule['kept'] else 'dropped'}" in said
    best = [c for c in by_name.values() if c["frontier"]]
    assert all(not _beats(a, b) for a in by_name.values() for b in best)
    assert all(any(_beats(b, c) for b in best) for c in by_name.values() if not c["frontier"])

    monkeypatch.setattr(Search, "run", lambda *a: pytest.fail("ran again"))
    assert choose(settings) == summary


def test_the_chosen_plan_goes_into_a_checkpoint(
    config: Callable[..., ChooseConfig], checkpoint: Path, ending: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def rules_on(self: Search, name: str, against: str | None = None, ends: bool = False) -> Any:
        value = float(len(self.candidates[name]) - len(self.candidates[against or PLAN_LESS]))
        return (value, [value, value]) if ends else value

    monkeypatch.setattr(Search, "worth", rules_on)
    settings = config(thresholds={"instance": ["own"]}, min_steps={"intra": [1]})
    choose(settings)
    plan = Plan.load(settings.out)
    assert plan.names == ["instance", "inter", "intra"] and plan.rule("intra").trigger.min_steps == 1
    assert plan.rule("instance").trigger.threshold == 0.5, "the probe's own"
    assert all(r.trigger.threshold is not None for r in plan.rules)
    base, new = str(checkpoint / "model"), tmp_path / "steered"
    assemble(AssembleConfig(str(ending), plan=settings.out, out=str(new), base=base))
    again, own = (SteeredModel.from_pretrained(*at, device="cpu") for at in ((new,), (ending, settings.out)))
    assert again.plan.to_dict() == own.plan.to_dict() == plan.to_dict()
    name = read_json(Path(settings.out) / "choice.json")["chosen"]
    traces = read_traces(Path(settings.out) / "traces" / f"{name}.jsonl")
    for model in (again, own):
        drawn = model.generate(
            [t.problem for t in traces[:5]], max_new_tokens=CAP, temperature=1.0, seed=batch_seed(0, 0, 0)
        )
        assert [g.response_ids for g in drawn] == [t.response_ids for t in traces[:5]]


def test_where_no_rule_pays_none_is_chosen(config: Callable[..., ChooseConfig], capsys: Any) -> None:
    settings = config(price=0.0, grid=["50%"], thresholds={}, min_steps={}, max_new_tokens=16)
    summary = choose(settings)  # too short for an answer: all are wrong, so that all are worth 0
    assert summary["chosen"] == PLAN_LESS and summary["rules"] == {} and not Plan.load(settings.out).rules
    assert "Chosen: no rule" in capsys.readouterr().out
    assert [r["kept"] for r in read_json(Path(settings.out) / "choice.json")["rules"]] == [False] * 3


def rows(right: Sequence[int], tokens: float) -> list[Outcome]:
    return [Outcome(f"p{i}", "f", 1, 0, i in right, tokens) for i in range(20)]


def test_rules_are_left_out_until_that_loses_something(config: Callable[..., ChooseConfig], monkeypatch: Any) -> None:
    """Worths laid down by rule: two help, one does harm that only shows beside the others."""

    class Laid(Search):
        def __init__(self) -> None:
            self.config, self.problems, self.plan = config(price=0.1), [], Plan.load(config().model)
            self.candidates, self.rows, self.watched, self.drawn = {}, {}, {}, {}

        def settings_of(self, rule: str) -> list[Setting]:
            return [Setting(rule, t) for t in (0.25, 0.5)]

        def measure(self, candidate: Any, bar: Any, task: Any) -> str:
            on = {s.rule: s.threshold for s in candidate}
            right = 8 + 4 * (on.get("intra") == 0.5) + ("inter" in on) - 3 * ({"inter", "intra"} <= set(on))
            name = "+".join(s.name for s in candidate) or PLAN_LESS
            self.candidates[name] = candidate
            self.rows[name] = rows(range(right), 100 - 40 * (on.get("instance") == 0.25))
            return name

    search = Laid()
    bar = SimpleNamespace(
        console=SimpleNamespace(print=lambda text: None), update=lambda *a, **k: None, add_task=lambda *a, **k: 0
    )
    chosen = search.run(bar)
    assert {s.rule: s.threshold for s in search.candidates[chosen]} == {"instance": 0.25, "intra": 0.5}
    assert search.worth(chosen) == pytest.approx(60 - 0.1 * 60)
    assert search.worth(chosen, PLAN_LESS) == pytest.approx(20 + 0.1 * 40)


def test_what_does_not_fit_is_named_before_anything_runs(
    config: Callable[..., ChooseConfig], checkpoint: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Search, "run", lambda *a: pytest.fail("ran"))
    for match, changes in (
        (r"holds no plan\.yaml", {"model": str(checkpoint / "base")}),
        ("has no rule 'nine'", {"thresholds": {"nine": ["0.5"]}}),
        ("'min_steps': rule instance is read once, after 3 steps", {"min_steps": {"instance": [2]}}),
    ):
        with pytest.raises(UserError, match=match):
            choose(config(**changes))


def test_problems_that_the_probes_saw_are_refused(config: Callable[..., ChooseConfig], capsys: Any) -> None:
    problems = make_problems(["words"], 4, "validation", 3)
    ids = [p.id for p in problems]
    split = {ids[0]: "test", ids[1]: "validation", ids[2]: "train", "other": "train"}
    with pytest.raises(UserError, match=f"1 problems, such as '{ids[2]}', are of the part 'train'.* --allow train"):
        check_unseen(config(), problems, split)
    with pytest.raises(UserError, match=f"'{ids[1]}', are of the part 'validation'"):
        check_unseen(config(allow=["train"]), problems, split)
    check_unseen(config(allow=["train", "validation"]), problems, split)
    check_unseen(config(), problems, {ids[0]: "test", "other": "train"})
    assert not capsys.readouterr().out
    check_unseen(config(), problems, None)
    assert "does not tell" in capsys.readouterr().out


def test_the_split_of_the_probes_goes_into_the_checkpoint_and_is_read_there(
    config: Callable[..., ChooseConfig], checkpoint: Path, validation: Path, tmp_path: Path
) -> None:
    fitted = shutil.copytree(checkpoint / "model" / "probes", tmp_path / "fitted")
    write_json(fitted / "split.json", {"words-validation-3-1": "train"})
    plan = str(checkpoint / "model" / "plan.yaml")
    assemble(AssembleConfig(str(checkpoint / "model"), str(fitted), str(tmp_path / "steered"), plan))
    with pytest.raises(UserError, match="'words-validation-3-1'"):
        choose(config(model=str(tmp_path / "steered")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"out": ""}, "'out' is empty"),
        ({"grid": []}, "'grid' is empty"),
        ({"price": -1.0}, "'price' must be a number from 0 on"),
        ({"grid": ["high"]}, "'grid': a threshold is .* got 'high'"),
        ({"grid": ["0%"]}, "'grid': .* got '0%'"),
        ({"thresholds": {"intra": ["nan"]}}, "'thresholds', 'intra': .* got 'nan'"),
        ({"thresholds": {"intra": []}}, "'thresholds', 'intra' names no threshold"),
        ({"min_steps": {"intra": [-1]}}, "'min_steps', 'intra'"),
        ({"allow": ["test"]}, "'allow' knows train and validation, got 'test'"),
        ({"samples": 0}, "'samples' must be at least 1"),
    ],
)
def test_bad_settings_are_named(config: Callable[..., ChooseConfig], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**more)
