"""Arms drawn from a server: a real process that speaks the API."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neureasoner.artifacts import read_json, write_json
from neureasoner.errors import UserError
from neureasoner.evaluation.evaluate import evaluate
from neureasoner.models import load_tokenizer
from neureasoner.traces import Problem, read_traces, write_rows

SERVER = Path(__file__).parents[1] / "data_builders" / "endpoint" / "server.py"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """``serve([[words], text], …)``: start a server that answers so; returns its address."""
    running: list[subprocess.Popen[str]] = []

    def start(*recorded: list[Any], options: tuple[str, ...] = ()) -> str:
        write_json(tmp_path / "answers.json", list(recorded))
        command = [sys.executable, str(SERVER), "--log", str(tmp_path / "log.jsonl"), "--keep-bodies", *options]
        process = subprocess.Popen(
            [*command, "--answers", str(tmp_path / "answers.json")], stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{int(process.stdout.readline())}/v1"

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def problems(folder: Path, rows: list[tuple[str, str]]) -> str:
    write_rows(folder / "problems.jsonl", [Problem(f"b{i}", "gsm8k", 1, q, a) for i, (q, a) in enumerate(rows)])
    return str(folder / "problems.jsonl")


def calls(tmp_path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    return [r["body"] for r in rows if r["event"] == "call"]


def test_vanilla_from_a_server(
    serve: Callable[..., str], settings: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    file = problems(tmp_path / "b", [("one half?", "1/2"), ("six sevens?", "42"), ("too long? [[length]]", "7")])
    url = serve(
        [["half"], "First I halve.\n\nThen I stop.\n</think>\n\nSo \\boxed{0.5}."],
        [["sevens"], "\\boxed{43}"],
        [["long"], "\\boxed{7} and so on and on and on"],
    )
    asked = {
        "model": str(checkpoint / "base"), "problems": file, "arms": ["vanilla"], "samples": 2, "batch_size": 2,
        "endpoint": {"model": "tiny", "base_url": url}, "temperature": 0.6, "seed": 3,
    }  # fmt: skip
    evaluate(settings(**asked))
    found = read_json(tmp_path / "out" / "results.json")
    (arm,) = found["arms"]
    assert arm["accuracy"] == pytest.approx(1 / 3) and arm["drawn_from"] == "server"
    assert arm["truncated"] == pytest.approx(1 / 3) and arm["seconds_per_problem"] is None
    traces = {t.id: t for t in read_traces(tmp_path / "out" / "traces" / "vanilla.jsonl")}
    half = traces["b0#0"]
    assert [half.response[s.char_start : s.char_end] for s in half.steps] == ["First I halve.\n\n", "Then I stop.\n"]
    assert half.meta["tokens"] == len("First I halve.\n\nThen I stop.\n</think>\n\nSo \\boxed{0.5}.") // 4 + 3
    assert not traces["b2#0"].finished and traces["b2#0"].labels and not traces["b2#0"].labels.correct
    assert arm["tokens_mean"] == pytest.approx((half.meta["tokens"] + traces["b1#0"].meta["tokens"] + 48) / 3)
    bodies = calls(tmp_path)
    assert len(bodies) == 6 and {b["top_p"] for b in bodies} == {0.95} and {b["temperature"] for b in bodies} == {0.6}
    assert {(b["messages"][0]["content"], b["seed"]) for b in bodies} == {
        (t.problem.question, t.meta["seed"]) for t in traces.values()
    }, "each (problem, sample) was asked once, with the seed it has in every arm"


def test_a_baseline_needs_hooks_so_it_runs_here(
    serve: Callable[..., str], settings: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    url = serve([["one"], "First I think for quite a while.\n\nThen I stop.\n</think>\n\nSo \\boxed{1}."])
    asked = {
        "model": str(checkpoint / "base"), "problems": problems(tmp_path / "b", [("one?", "1")]),
        "arms": ["vanilla", "thinking_budget"], "endpoint": {"model": "tiny", "base_url": url},
    }  # fmt: skip
    evaluate(settings(**asked))
    found = read_json(tmp_path / "out" / "results.json")
    assert {a["name"]: a["drawn_from"] for a in found["arms"]} == {"vanilla": "server", "thinking_budget": "here"}
    [vanilla] = read_traces(tmp_path / "out" / "traces" / "vanilla.jsonl")
    assert found["baselines"]["thinking_budget"]["tokens"] == round(vanilla.meta["thinking_tokens"] / 2) > 2
    assert len(calls(tmp_path)) == 1
    with pytest.raises(UserError, match="serves arms that need no hooks, and there is none among them"):
        evaluate(settings(**(asked | {"arms": ["wait_penalty"], "out": str(tmp_path / "other")})))


def test_what_the_ledger_holds_is_not_asked_again(
    serve: Callable[..., str], settings: Callable[..., Any], tmp_path: Path
) -> None:
    file = problems(tmp_path / "b", [("one?", "1"), ("two?", "2")])
    asked = {"problems": file, "arms": ["vanilla"], "batch_size": 1, "endpoint": {"model": "tiny"}}
    asked["endpoint"]["base_url"] = serve([["?"], "\\boxed{1}"])  # type: ignore[index]
    evaluate(settings(**asked, shard="0/2"))
    part = next((tmp_path / "out" / "parts" / "vanilla").glob("*.jsonl"))
    before = part.read_text()
    part.unlink()  # killed after the answer came and before the part was written
    evaluate(settings(**(asked | {"endpoint": asked["endpoint"] | {"concurrency": "2"}}), shard="0/2"))  # type: ignore[operator]
    assert part.read_text() == before and len(calls(tmp_path)) == 1
    evaluate(settings(**asked))
    assert len(calls(tmp_path)) == 2


def test_no_thinking_is_handed_over_as_a_beginning(
    serve: Callable[..., str], settings: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    file = problems(tmp_path / "b", [("one?", "1")])
    url = serve([["one"], "\\boxed{1}"])
    plain = {"model": str(checkpoint / "base"), "problems": file, "arms": ["no_thinking"]}
    evaluate(settings(**plain, endpoint={"model": "tiny", "base_url": url}))
    (body,) = calls(tmp_path)
    assert body["messages"][1]["role"] == "assistant" and body["continue_final_message"] is True
    assert body["messages"][1]["content"].startswith("<think>\nOkay, I think I have finished")
    (trace,) = read_traces(tmp_path / "out" / "traces" / "no_thinking.jsonl")
    assert trace.steps == [] and trace.thinking_end == 0 and trace.labels and trace.labels.correct


def test_a_template_that_closes_the_thinking_itself_is_left_to_do_so(
    serve: Callable[..., str], settings: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoint / "base", base)
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\n", "<think>\n\n</think>\n\n")
    tokenizer.save_pretrained(base)
    url = serve([["one"], "Two: </think>\n\n\\boxed{1}"])
    file = problems(tmp_path / "b", [("one?", "1")])
    for arm in ("no_thinking", "vanilla"):
        out = tmp_path / arm
        evaluate(
            settings(model=str(base), problems=file, arms=[arm], endpoint={"model": "m", "base_url": url}, out=str(out))
        )
        (trace,) = read_traces(out / "traces" / f"{arm}.jsonl")
        assert trace.steps == [] and trace.thinking_end == 0 and "prefill" not in trace.meta
    for body in calls(tmp_path):
        assert len(body["messages"]) == 1 and "continue_final_message" not in body


def test_a_server_that_does_not_answer(serve: Callable[..., str], settings: Callable[..., Any], tmp_path: Path) -> None:
    file = problems(tmp_path / "b", [("good?", "1"), ("bad? [[500]]", "2")])
    url = serve([["?"], "\\boxed{1}"])
    endpoint = {"model": "tiny", "base_url": url, "tries": "2", "backoff": "0.01"}
    with pytest.raises(UserError, match=r"1 of 2 responses did not come .*run the same command again"):
        evaluate(settings(problems=file, arms=["vanilla"], endpoint=endpoint))
    assert not list((tmp_path / "out").glob("parts/*/*.jsonl"))
    with pytest.raises(UserError, match="must use the chat API"):
        evaluate(
            settings(problems=file, arms=["vanilla"], endpoint=endpoint | {"api": "responses"}, out=str(tmp_path / "r"))
        )
