"""The stages that ask a model, against a real server with recorded answers: what the exact judge and rewriter say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from neureasoner.artifacts import read_json
from neureasoner.data_builders.config import JudgeConfig, ProblemsConfig, ReconstructConfig, RolloutsConfig
from neureasoner.data_builders.judges import ExactJudge
from neureasoner.data_builders.judging import judge_traces
from neureasoner.data_builders.layouts import read_reconstructions
from neureasoner.data_builders.problem_file import build_problems
from neureasoner.data_builders.reconstruct import reconstruct, references
from neureasoner.data_builders.rewriters import ExactRewriter, Rejected
from neureasoner.data_builders.rollouts import sample_rollouts
from neureasoner.data_builders.sources.config import ImportConfig
from neureasoner.data_builders.sources.importer import import_corpus
from neureasoner.errors import UserError
from neureasoner.traces import read_traces

N = 9


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("traces")
    build_problems(ProblemsConfig(out=str(root), n=N, split="validation", seed=3))
    rollouts = RolloutsConfig(
        model="tiny", problems=str(root / "problems.jsonl"), out=str(root / "r"), max_new_tokens=250
    )
    sample_rollouts(rollouts)
    return root / "r" / "traces.jsonl"


def recorded(traces: Path, folder: Path) -> Path:
    """For each trace the answers of the exact judge, in the judges' schemas."""
    rows = []
    for trace in read_traces(traces):
        labels = ExactJudge().judge(trace)
        intra, inter = labels.intra, labels.inter
        said: list[dict[str, Any]] = [
            {
                "has_error": intra.has_error,
                "first_error_step": intra.first_error_step,
                "error_type": intra.error_type,
                "explanation": intra.explanation or "all steps hold",
            },
            {
                "is_stagnant": inter.is_stagnant,
                "loop_detected_at": inter.loop_detected_at or "none",
                "loop_theme": inter.loop_theme,
                "severity": inter.severity,
                "explanation": inter.explanation or "it moves on",
            },
        ]
        for key, answer in zip(("has_error", "is_stagnant"), said, strict=True):
            rows.append([[trace.problem.question, key], json.dumps(answer)])
    path = folder / "answers.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], dict[str, Any]]:
    monkeypatch.setenv("TEST_KEY", "sk-canary-0123456789abcdef")
    (tmp_path / "prices.yaml").write_text("models:\n  tiny: {input: 1.0, cached: 0.5, output: 4.0, batch: 0.5}\n")
    return lambda server: {
        "model": "tiny", "base_url": server.url, "key_env": "TEST_KEY", "backoff": 0.02,
        "prices": str(tmp_path / "prices.yaml"), "ledger": str(tmp_path / "ledger.sqlite"),
    }  # fmt: skip


def test_a_model_that_says_what_the_exact_judge_says_labels_alike(
    traces: Path, tmp_path: Path, serve: Any, endpoint: Any, capsys: Any
) -> None:
    judge_traces(JudgeConfig(traces=str(traces), out=str(tmp_path / "exact")))
    server = serve("--answers", str(recorded(traces, tmp_path)))
    config = JudgeConfig(
        traces=str(traces), out=str(tmp_path / "llm"), judge="llm", endpoint=endpoint(server),
        compare=str(tmp_path / "exact" / "traces.jsonl"),
    )  # fmt: skip
    done = judge_traces(config)
    exact = {t.id: t.labels for t in read_traces(tmp_path / "exact" / "traces.jsonl")}
    mine = {t.id: t.labels for t in read_traces(tmp_path / "llm" / "traces.jsonl")}
    responses = {t.id: t.response for t in read_traces(traces)}
    assert set(mine) == set(exact) and done["bill"]["calls"] == 2 * N and done["bill"]["cost"] > 0
    for name, labels in mine.items():
        assert labels.correct == exact[name].correct and labels.judge == "llm:tiny"
        quote = exact[name].intra.first_error_step
        if quote is None or responses[name].count(quote) == 1:  # a quote that occurs twice is taken for its first
            assert (labels.intra.step, labels.intra.span) == (exact[name].intra.step, exact[name].intra.span)
        assert labels.inter.is_stagnant == exact[name].inter.is_stagnant
    rows = {r["name"].strip(): r for r in read_json(tmp_path / "llm" / "agreement.json")["rows"]}
    assert rows["wrong step"]["agreement"]["value"] == 1.0 and "wrong step" in capsys.readouterr().out

    again = judge_traces(JudgeConfig(**{**vars(config), "out": str(tmp_path / "again"), "compare": ""}))
    assert again["bill"]["calls"] == 0 and len(server.rows("call")) == 2 * N, "answers are paid for once"


def test_a_dry_run_asks_nothing_and_writes_nothing(
    traces: Path, tmp_path: Path, serve: Any, endpoint: Any, capsys: Any
) -> None:
    server = serve()
    config = JudgeConfig(
        traces=str(traces), out=str(tmp_path / "o"), judge="llm", endpoint=endpoint(server), dry_run=True
    )
    expected = judge_traces(config)
    assert expected["requests"] == 2 * N and expected["cost"] > 0 and not server.rows("call")
    assert not (tmp_path / "o").exists() and "cost" in capsys.readouterr().out


def test_useless_answers_leave_no_labels_and_are_told_of(
    traces: Path, tmp_path: Path, serve: Any, endpoint: Any
) -> None:
    with pytest.raises(UserError, match="no trace could be labelled"):
        judge_traces(JudgeConfig(traces=str(traces), out=str(tmp_path / "o"), judge="llm", endpoint=endpoint(serve())))
    assert not (tmp_path / "o" / "traces.jsonl").exists()


def test_rewritten_traces_are_validated_and_rejections_kept(tmp_path: Path, serve: Any, endpoint: Any) -> None:
    config = ReconstructConfig(out=str(tmp_path / "o"), corpus=12, intra=1, inter=0, plain=0.5, seed=2)
    answers, made = [], {}
    for i, ref in enumerate(references(config)):
        try:
            row = ExactRewriter().intra(ref, Random(i))
        except Rejected:
            continue
        made[ref.id] = row
        if i % 4:  # every fourth question gets the server's own words, which are no trace
            answers.append([[ref.problem.question, "REFERENCE_REASONING"], row.response])
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    server = serve("--answers", str(tmp_path / "answers.json"))
    asked = ReconstructConfig(**{**vars(config), "rewriter": "llm", "endpoint": endpoint(server)})
    done = reconstruct(asked)
    rows = read_reconstructions(tmp_path / "o" / "train.jsonl")
    assert done["levels"]["intra"] >= len(answers) - 1 and done["levels"]["plain"] > 0 and done["rejected"] > 0
    for row in rows:
        if row.level == "intra":
            assert row.response == made[row.reference_id].response
    reasons = [json.loads(x)["reason"] for x in (tmp_path / "o" / "rejected.jsonl").read_text().splitlines()]
    assert all(reasons) and done["bill"]["faults"]
    card = (tmp_path / "o" / "README.md").read_text()
    assert "Rejected" in card and "calls" in card and "sk-canary" not in card
    order = [r.reference_id for r in rows]
    assert order == sorted(order, key=lambda x: int(x.split("-")[1])), "in the order of the references"


def test_bad_settings_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="'endpoint' must name the model"):
        JudgeConfig(traces="t", out="o", judge="llm")
    with pytest.raises(UserError, match="the exact judge asks nobody"):
        JudgeConfig(traces="t", out="o", endpoint={"model": "x"})
    with pytest.raises(UserError, match=r"key 'endpoint'.*temprature"):
        judge_traces(
            JudgeConfig(traces=__file__, out="o", judge="llm", endpoint={"model": "x", "temprature": 1}, dry_run=True)
        )
    with pytest.raises(UserError, match="'references' \\(imported\\)"):
        ReconstructConfig(out="o")


def test_imported_references_are_judged_and_rewritten_by_a_mechanical_author(
    tmp_path: Path, serve: Any, endpoint: Any
) -> None:
    """A whole job over imported rows; the author breaks a rule now and then and is told so (author.py)."""
    rows = []
    for i in range(30):
        steps = [f"Let me see what {i} plus {k} gives in this case, it is {i + k}." for k in range(6)]
        text = "<think>\n" + "\n\n".join(steps) + f"\n</think>\n\nIt is \\boxed{{{i + 5}}}."
        turns = [{"from": "user", "value": f"What is {i} plus 5?"}, {"from": "assistant", "value": text}]
        rows.append(json.dumps({"id": f"row-{i}", "conversations": turns, "answer": str(i + 5)}))
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    import_corpus(ImportConfig(input=str(tmp_path / "corpus.jsonl"), out=str(tmp_path / "i")))
    references = str(tmp_path / "i" / "references.jsonl")
    server = serve("--author")
    judged = judge_traces(
        JudgeConfig(
            references=references, tokenizer="tiny", out=str(tmp_path / "j"), judge="llm", endpoint=endpoint(server)
        )
    )
    assert judged["n"] == 30 and judged["accuracy"] == 1 and 0 < judged["wrong_step"] < 1
    for trace in read_traces(tmp_path / "j" / "traces.jsonl"):
        assert trace.labels is not None and trace.finished and len(trace.steps) == 6
        if trace.labels.intra.has_error:
            quote = trace.response[slice(*trace.labels.intra.span)]  # type: ignore[misc]
            assert quote == trace.labels.intra.first_error_step and quote in trace.response
    made = reconstruct(
        ReconstructConfig(
            references=references, out=str(tmp_path / "d"), rewriter="llm", endpoint=endpoint(server), intra=1, inter=1
        )
    )
    assert made["levels"]["intra"] == 30 and made["levels"]["inter"] == 30 and made["rejected"] == 0
    assert made["bill"]["calls"] > 60, "some answers broke a rule and were asked for again"
    assert {r.level for r in read_reconstructions(tmp_path / "d" / "train.jsonl")} == {"intra", "inter", "plain"}
