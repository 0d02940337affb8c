"""Recipes: everything is checked before anything runs, a second run skips, a killed one goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from neureasoner import launch
from neureasoner.commands import COMMANDS, Command
from neureasoner.errors import UserError
from neureasoner.floor_config import RunConfig
from neureasoner.run import _strings, find_recipe, load_recipe, run_recipe
from neureasoner.stages import StageFolder


@dataclass
class Copy:
    """Write a text, or copy a file."""

    out: str
    text: str = ""
    source: str = ""
    sources: list[str] = field(default_factory=list)


CALLS: list[str] = []


def copy(config: Copy) -> dict[str, Any]:
    inputs = [config.source] if config.source else []
    stage = StageFolder(config.out, "copy", config, inputs)
    if stage.done:
        return stage.summary
    CALLS.append(Path(config.out).name)
    if config.text == "stop":
        raise KeyboardInterrupt
    text = Path(config.source).read_text() if config.source else config.text
    (Path(config.out) / "text").write_text(text)
    return stage.finish({})


@pytest.fixture(autouse=True)
def _commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    CALLS.clear()
    monkeypatch.setattr(Command, "config_class", lambda self: Copy if self.config == "Copy" else None)
    monkeypatch.setattr(Command, "load", lambda self: copy)
    monkeypatch.setitem(COMMANDS, "data copy", Command("", "", "Copy", "", ""))
    monkeypatch.chdir(tmp_path)


def recipe(*stages: Any, **more: Any) -> RunConfig:
    Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "out": "runs/r", "stages": list(stages), **more}))
    return RunConfig("r.yaml")


TWO = (
    {"data copy": {"text": "hello", "out": "run:a"}},
    {"data copy": {"source": "run:a/text", "sources": ["run:a", "b"], "out": "run:b"}, "as": "second"},
)


def test_runs_in_order_then_skips_everything(capsys: pytest.CaptureFixture[str]) -> None:
    first = run_recipe(recipe(*TWO))
    assert first["ran"] == ["data copy", "second"]
    assert CALLS == ["a", "b"] and Path("runs/r/b/text").read_text() == "hello"
    second = run_recipe(recipe(*TWO))
    assert second["ran"] == [] and second["skipped"] == first["ran"] and CALLS == ["a", "b"]
    assert "everything is done. Results: " in capsys.readouterr().out


def test_paths_overrides_and_out() -> None:
    config = recipe(*TWO)
    config.out, config.set = "other", ["data copy.text=bye", "second.sources=[x]"]
    name, run_dir, stages = load_recipe(config)
    assert (name, run_dir) == ("r", Path("other"))
    assert stages[0].config == Copy("other/a", "bye")
    assert stages[1].config == Copy("other/b", "", "other/a/text", ["x"])
    assert load_recipe(recipe(*TWO))[2][1].config.sources == ["runs/r/a", "b"]


def test_promise_9_a_killed_run_goes_on_where_it_stopped() -> None:
    stop = (TWO[0], {"data copy": {"text": "stop", "out": "run:b"}, "as": "second"})
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(*stop))
    assert run_recipe(recipe(TWO[0]))["ran"] == []
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(*stop))
    assert CALLS == ["a", "b", "b"]


def test_changed_settings_are_refused_and_changed_inputs_noticed() -> None:
    run_recipe(recipe(*TWO))
    config = recipe(*TWO)
    config.set = ["data copy.text=bye"]
    with pytest.raises(UserError, match="output of other settings"):
        run_recipe(config)
    Path("runs/r/a/text").write_text("edited")
    with pytest.raises(UserError, match="output of other settings or inputs"):
        run_recipe(recipe(*TWO))


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([TWO[0], {"data cpoy": {}}], "stage 2: command 'data cpoy' is unknown; did you mean 'data copy'"),
        ([TWO[0], {"data copy": {"out": "x", "txt": "y"}, "as": "c"}], "stage 2 (c): key 'txt' is unknown"),
        ([TWO[0], TWO[0]], "the label occurs twice"),
        ([TWO[0], {"data copy": {}, "as": "c"}], "key 'out' is required"),
        ([TWO[0], "data copy"], "expected 'command: {settings}'"),
        ([{"data copy": {"out": "x"}, "launch": "l.yaml"}], "'launch' belongs to training only"),
        ([{"run": {"recipe": "r.yaml"}}], "command 'run' is unknown"),
        ([], "must be a list"),
    ],
)
def test_everything_is_checked_before_anything_runs(stages: list[Any], words: str) -> None:
    with pytest.raises(UserError) as e:
        run_recipe(recipe(*stages))
    assert words in str(e.value) and CALLS == [] and not Path("runs").exists()


def test_bad_overrides_and_recipes_are_named(tmp_path: Path) -> None:
    config = recipe(*TWO)
    for item, words in (("text=1", "STAGE.KEY=VALUE"), ("scond.text=1", "did you mean 'second'")):
        config.set = [item]
        with pytest.raises(UserError, match=words):
            load_recipe(config)
    with pytest.raises(UserError, match="key 'stage' is unknown"):
        load_recipe(recipe(*TWO, stage=[]))
    with pytest.raises(UserError, match="no such recipe file"):
        find_recipe("absent.yaml")
    shipped = tmp_path / "configs/recipes/tiny"
    shipped.mkdir(parents=True)
    (shipped / "quickstart.yaml").touch()
    assert find_recipe("quickstart") == Path("configs/recipes/tiny/quickstart.yaml")
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        find_recipe("quikstart")


def test_what_is_shipped_is_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The current folder has none of it; what it has of its own goes before what is shipped."""
    for name in ("quickstart", "full", "reproduce_table2"):
        found = find_recipe(name)
        assert found.is_absolute() and found.name == f"{name}.yaml" and found.is_file()
        assert find_recipe(f"configs/recipes/tiny/{name}.yaml") == found
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "full", "adaras", "bias_only", "combination", "measure", "reproduce_table7"):
        _, run_dir, stages = load_recipe(RunConfig(name))
        assert run_dir == Path("runs") / name.replace("reproduce_table7", "reproduce_probes")
        for text in (s for stage in stages for s in _strings(stage.settings)):
            assert not text.startswith("configs/") and (not text.endswith(".yaml") or Path(text).is_file()), text
    stages = {s.label: s for s in load_recipe(RunConfig("quickstart"))[2]}
    assert stages["training sft"].settings["mask_failure"] is True, "read from the shipped sft.yaml"
    plan = tmp_path / "configs" / "plans" / "tiny.yaml"
    plan.parent.mkdir(parents=True)
    plan.write_text("mine")
    stages = {s.label: s for s in load_recipe(RunConfig("quickstart"))[2]}
    assert stages["assemble"].settings["plan"] == "configs/plans/tiny.yaml"
    launch = {"training sft": {"data": "d", "out": "o"}, "launch": "configs/accelerate/cpu.yaml"}
    assert Path(load_recipe(recipe(launch))[2][0].launch).is_file()
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        find_recipe("quikstart")
    with pytest.raises(UserError, match=r"configs/recipes/absent\.yaml: no such recipe file"):
        find_recipe("configs/recipes/absent.yaml")


def test_training_settings_are_checked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from neureasoner.training.sft_config import SftArguments

    monkeypatch.setattr(Command, "config_class", lambda self: SftArguments)
    good = {"data": "run:d/train.jsonl", "out": "run:sft", "learning_rate": 1e-4, "mask_failure": "true"}
    stage = load_recipe(recipe({"training sft": good}))[2][0]
    assert stage.settings == {**good, "data": "runs/r/d/train.jsonl", "out": "runs/r/sft", "mask_failure": True}
    for bad, words in (({"learning_rat": 1}, "did you mean 'learning_rate'"), ({"batch_size": "x"}, "whole number")):
        with pytest.raises(UserError, match=words):
            load_recipe(recipe({"training sft": {**good, **bad}}))
    with pytest.raises(UserError, match="'data' is required"):
        load_recipe(recipe({"training sft": {"out": "x"}}))


def test_training_keys_are_those_of_trl() -> None:
    keys = launch.training_keys()
    assert {"learning_rate", "per_device_train_batch_size", "max_length", "packing", "output_dir", "bf16"} <= keys


def test_accelerate_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "has_gpu", lambda: False)
    line = launch.command_line(Path("s.py"), ["--config", "c.yaml"])
    assert line[1:3] == ["-m", "accelerate.commands.launch"] and line[-4:] == ["--cpu", "s.py", "--config", "c.yaml"]
    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    assert "--cpu" not in launch.command_line(Path("s.py"), [])
    with pytest.raises(UserError, match="no such file"):
        launch.command_line(Path("s.py"), [], "absent.yaml")
    assert launch.training_script("sft.py").is_file()
    with pytest.raises(UserError, match=r"absent\.py"):
        launch.training_script("absent.py")


def test_a_failing_script_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "command_line", lambda script, args, config="": [sys.executable, "-c", *args])
    launch.accelerate(tmp_path, ["pass"])
    with pytest.raises(UserError, match="exit code 3"):
        launch.accelerate(tmp_path, ["raise SystemExit(3)"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_launch_leaves_no_process_behind(tmp_path: Path, number: int) -> None:
    """The launched process has a child of its own, as under accelerate; an interrupt of ours alone ends all three."""
    grandchild = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    code = (
        "import signal, sys; from pathlib import Path; from neureasoner import launch\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        f"launch.command_line = lambda *_: [sys.executable, '-c', {child!r}]\n"
        "try: launch.accelerate(Path('x'), [])\nexcept KeyboardInterrupt: sys.exit(130)"
    )
    ours = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    pid = _wait_for(tmp_path / "pid")
    ours.send_signal(number)
    assert ours.wait(30) == 130
    deadline = time.time() + 10
    while _alive(pid) and time.time() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _wait_for(path: Path) -> int:
    deadline = time.time() + 30
    while time.time() < deadline:
        if path.is_file() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError("the grandchild did not start")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.is_file() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")
