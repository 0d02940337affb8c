"""The report: self-contained, escaped, honest; and the terminal ending."""

from __future__ import annotations

import io
import json
import re
from html import escape
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from neureasoner.artifacts import read_json, write_json
from neureasoner.errors import UserError
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.examples import false_alarms, fits, main_pair, misses, pick, view
from neureasoner.evaluation.markdown import markdown
from neureasoner.evaluation.markdown import probes_table as probes_lines
from neureasoner.evaluation.report import embed, write_report
from neureasoner.evaluation.results import build, probes_of
from neureasoner.evaluation.runner import outcomes
from neureasoner.evaluation.show import choose_examples, show
from neureasoner.evaluation.verdict import caution, headline, sentences
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Step, Trace, write_rows

EVIL = "</script><script>alert('{{data}}')</script><img src=http://evil onerror=x><!-- & \u2028 \U0001f9e0"


def trace(i: int, arm: str, right: bool, acted: bool = False, evil: bool = False) -> Trace:
    head = f"{EVIL if evil else 'Think'}.\n\n"
    text = head + "1 + 1 = 3.\n\n" + ("<INTRA>\nI see.\n\n" if acted else "") + "</think>\n\nIt is \\boxed{2}."
    a, b = len(head), len(head) + 12
    steps = [Step(0, a, 0, 4), Step(a, b, 4, 8)] + ([Step(b, b + 16, 8, 12)] if acted else [])
    event = {"step": 1, "token": 8, "rule": "intra", "score": 0.9, "threshold": 0.5, "action": "<INTRA>"}
    return Trace(
        f"p{i}#0",
        Problem(f"p{i}", "arithmetic", 1 + i % 3, EVIL if evil else f"Question {i}?", "2"),
        [1],
        list(range(20 if acted else 30 + i)),
        text,
        steps,
        True,
        Labels(
            right,
            "2" if right else "3",
            IntraLabel(True, "1 + 1 = 3", "calculation", "it is 2", (a, a + 9), 1),
            InterLabel(),
        ),
        [event | {"suppressed": False, "char": b}] if acted else [],
        {"arm": arm, "sample": 0, "forced_chars": [[b, b + 7]] if acted else [], "seconds": 0.1, "scores": []},
    )


@pytest.fixture
def folder(tmp_path: Any) -> Any:
    """results.json and traces of two arms; problem 3 and its traces try to break out of the page."""
    traces = {
        "vanilla": [trace(i, "vanilla", i % 2 == 0, evil=i == 3) for i in range(40)],
        "full": [trace(i, "full", i % 5 != 0, acted=True, evil=i == 3) for i in range(40)],
    }
    for name, rows in traces.items():
        write_rows(tmp_path / "traces" / f"{name}.jsonl", rows)
    problems = [t.problem for t in traces["vanilla"]]
    write_rows(tmp_path / "problems.jsonl", problems)
    config = EvaluateConfig("model", str(tmp_path / "problems.jsonl"), str(tmp_path), resamples=200)
    results = build(config, EVIL, problems, {k: outcomes(v, 512) for k, v in traces.items()}, {"inter": EVIL}, {})
    write_json(tmp_path / "results.json", results)
    return tmp_path


class Page(HTMLParser):
    """Collects tags, scripts and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        self.links += [f"{k}=" for k, _ in attrs if k.startswith("on")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def test_report_is_self_contained_and_nothing_breaks_out(folder: Any) -> None:
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.tags.count("script") == 82 and "img" not in page.tags and "link" not in page.tags
    assert all(link.startswith("#") for link in page.links), page.links
    assert "@import" not in html and not re.search(r"url\s*\(", html) and "{{" not in page.scripts[-1]
    data, *traces = map(json.loads, page.scripts[:-1])
    assert data["arms"] == ["vanilla", "full"] and len(data["rows"]) == len(traces) == 80
    for row in data["rows"]:
        assert [traces[row["i"]][k] for k in ("arm", "problem", "right")] == [
            row[k] for k in ("arm", "problem", "right")
        ]
    odd = next(t for t in traces if t["problem"] == "p3" and t["arm"] == "full")
    assert odd["question"] == EVIL and odd["text"].startswith(EVIL), "text survives exactly"
    assert list((folder / "figures").glob("*.svg"))


REFRESH = '</small></td></table><meta http-equiv="refresh" content="0;url=http://evil"><svg/onload=x>' + EVIL


def tags(folder: Any) -> list[str]:
    page = Page()
    page.feed(write_report(folder, 4).read_text(encoding="utf-8"))
    assert all(link.startswith("#") for link in page.links), page.links
    return page.tags


@pytest.mark.parametrize("kind", ["figure", "list", "text"])
def test_a_probe_s_own_words_break_nothing(folder: Any, kind: str) -> None:
    """All that a checkpoint's probe.json says of itself, through ``results.json`` into the page: no tag of its own."""
    results, model, seen = read_json(folder / "results.json"), folder / "model", []
    write_json(model / "config.json", {})
    config = EvaluateConfig(str(model), str(folder / "problems.jsonl"), str(folder))
    for word in ("w", REFRESH):
        figure = {"auroc": {"value": word, "low": word, "high": 1}, "recall": word}
        test = {"figure": figure, "list": [word]}.get(kind, word)
        said = {"features": {"name": word, "window": word}, "threshold": word}
        said["notes"] = {"seed": word, "split": word, "test": test}
        write_json(model / "probes" / "intra" / "probe.json", said)
        entry = probes_of(config)["intra"]
        assert entry["window"] == word == entry["seed"]
        fitted = {"name": word, "test": {"auroc": {"value": 0.5, "low": 0.4, "high": 0.6}}}
        probes = {"intra": entry, word: entry | {"chosen": fitted, "controls": {word: fitted}}}
        neurons = {level: {"site": word} for level in probes}
        write_json(folder / "results.json", results | {"probes": probes, "neurons": neurons})
        seen.append(tags(folder))
    assert seen[0] == seen[1] and "meta" in seen[0]
    assert {f.parent.name for f in folder.parent.rglob("*.svg")} == {"figures"}


def test_numbers_of_the_results_are_numbers(folder: Any) -> None:
    """What is printed as a number is one, or the file is refused."""
    results = read_json(folder / "results.json")
    arm, pair = results["arms"][0], results["comparisons"][0]
    for at, key in ((arm, "n_problems"), (arm, "n_samples"), (results["problems"], "n"), (pair, "accuracy_delta")):
        before, at[key] = at[key], REFRESH
        write_json(folder / "results.json", results)
        with pytest.raises(UserError, match=rf"{key} is not what it should be"):
            write_report(folder, 4)
        at[key] = before


def test_the_page_says_of_what_and_how(folder: Any) -> None:
    """The page says what results.md says: benchmark, release, how much of it, whether it may be shown, the protocol."""
    results = read_json(folder / "results.json")
    told = {"benchmark": "lcb", "release": "release_v5", "whole_set": 880, "private": "do not <b>publish</b>"}
    results["problems"]["source"] = told
    results["sampling"]["differs_from_paper"] = {"samples": [1, 5]}
    results["sandbox"] = {"level": "limits", "user": "as the same user", "held": ["memory"]}
    write_json(folder / "results.json", results)
    text = "Benchmark lcb, release_v5: 40 of 880 problems. Private: do not <b>publish</b>. Not the paper's protocol: "
    text += "samples 1 (paper: 5). Programs ran in the sandbox at the level 'limits', as the same user."
    assert text in markdown(results)
    html = write_report(folder, 4).read_text(encoding="utf-8")
    made = html[html.index('<section id="made">') :]
    assert escape(text) in made and "<b>publish" not in html
    for old in ("source", "differs_from_paper"):  # as older versions wrote it
        results["problems"].pop(old, None), results["sampling"].pop(old, None)
    write_json(folder / "results.json", results | {"sandbox": {"level": "x", "user": "y", "held": []}})
    assert "Benchmark" not in write_report(folder, 4).read_text(encoding="utf-8").split('id="made"')[1]


def test_view_marks_steps_and_blocks() -> None:
    seen = view(trace(1, "full", True, acted=True))
    assert [s[2] for s in seen["steps"]] == ["", "", "block"] and seen["wrong"] == 1
    a, b = seen["span"]
    assert seen["text"][a:b] == "1 + 1 = 3"
    [(a, b)] = seen["forced"]
    assert seen["text"][a:b] == "<INTRA>" and seen["events"] == [["intra", 2, 0.9, 0.5, 8]]


def test_embedded_traces_are_capped_and_stay_paired(folder: Any) -> None:
    html = write_report(folder, cap=10).read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    traces = json.loads(page.scripts[0])["rows"]
    assert len(traces) == 10 and len({t["problem"] for t in traces}) == 5
    assert "10 of 80 traces are embedded" in html


def test_pick_prefers_repairs() -> None:
    traces = {
        "vanilla": [trace(i, "vanilla", i != 7) for i in range(20)],
        "full": [trace(i, "full", True, acted=i == 7) for i in range(20)],
    }
    assert "p7" in pick(traces, 2)
    title, pairs = choose_examples(traces, 1)
    assert title.startswith("1 of 1") and pairs[0][1].problem.id == "p7"
    honest, none = choose_examples({**traces, "full": traces["vanilla"]}, 3)
    assert honest == "full never stepped in" and not none


def test_a_page_has_a_budget_of_characters() -> None:
    traces = {"vanilla": [trace(i, "vanilla", True) for i in range(20)]}
    size = len(traces["vanilla"][0].response)
    assert len(pick(traces, 20, budget=3 * size)) == 3
    assert len(pick(traces, 20, budget=1)) == 1, "one is shown whatever its size"


def test_false_alarms_and_misses() -> None:
    seen = trace(1, "full", True, acted=True)  # wrong step 1, intra steps in after it
    assert false_alarms(seen) == [] and misses(seen) == []
    seen.events[0]["step"] = 0
    assert false_alarms(seen) == ["intra"], "nothing was wrong yet"
    assert misses(seen) == ["intra"], "and nobody stepped in when it was"
    seen.events[0]["suppressed"] = True
    assert false_alarms(seen) == [], "an event that was not carried out is none"
    silent = trace(1, "vanilla", True)
    assert misses(silent) == [], "who does not watch does not miss"
    silent.meta["scores"] = [{"step": 1, "token": 8, "rule": "intra", "score": 0.1}]
    assert misses(silent) == ["intra"]
    circle = trace(1, "full", False, acted=True)
    assert circle.labels is not None
    circle.labels.intra, circle.labels.inter = IntraLabel(), InterLabel(is_stagnant=True, steps=(1, 3))
    assert false_alarms(circle) == ["intra"] and misses(circle) == []
    circle.events[0]["rule"] = "inter"
    assert false_alarms(circle) == [] and misses(circle) == []
    circle.labels.inter.steps = (2, 3)
    assert false_alarms(circle) == ["inter"] and misses(circle) == ["inter"]
    for right, stood, alarm in ((False, None, True), (False, 20, True), (False, 8, False), (True, None, False)):
        closed = trace(1, "full", right, acted=True)
        assert closed.labels is not None
        closed.events[0]["rule"], closed.labels.answer_token = "instance", stood
        assert false_alarms(closed) == (["instance"] if alarm else [])
    closed.labels = None
    assert false_alarms(closed) == [] and misses(closed) == []


@pytest.mark.parametrize("rule", ["intra", "inter", "instance"])
def test_where_only_answers_were_graded_nothing_is_said_of_steps(rule: str) -> None:
    from neureasoner.evaluation.runner import judged

    seen = trace(1, "full", False, acted=True)
    seen.problem.family, seen.problem.answer, seen.events[0]["rule"] = "gsm8k", "3", rule
    seen.labels = judged(seen)
    assert not seen.labels.correct and not view(seen)["judged"]
    assert view(seen)["alarms"] == view(seen)["misses"] == []
    assert not {"false_alarm", "missed", "error", "circle"} & set(view(seen)["kinds"])
    assert view(trace(1, "full", False, acted=True))["judged"]


def test_flips_need_another_trace() -> None:
    right, wrong = trace(1, "full", True), trace(1, "vanilla", False)
    assert fits("to_right", right, wrong) and not fits("to_wrong", right, wrong)
    assert fits("to_wrong", wrong, right) and not fits("to_right", wrong, right)
    assert not any(fits(k, right, other) for k in ("to_right", "to_wrong") for other in (None, right))


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (["vanilla", "intra", "full", "x"], ("vanilla", "full")),
        (["vanilla", "a", "b"], ("vanilla", "b")),
        (["a", "b", "self_consistency"], ("a", "b")),
        (["a"], ("a", "a")),
        ([], ("", "")),
    ],
)
def test_the_arms_shown_first(names: list[str], pair: tuple[str, str]) -> None:
    assert main_pair(names) == pair


def test_families_table_says_what_the_results_say(folder: Any) -> None:
    from neureasoner.evaluation.report_tables import families_table

    results = read_json(folder / "results.json")
    text = families_table(results)
    for a in results["arms"]:
        f = a["by_family"]["arithmetic"]
        low, high = f["accuracy_ci"]
        cell = f"{100 * f['accuracy']:.1f}%<small>[{100 * low:.1f}, {100 * high:.1f}] · {f['tokens_mean']:.0f} tokens"
        assert cell in text


def test_costs_and_curves_are_in_the_page(folder: Any) -> None:
    from neureasoner.evaluation.report_tables import costs_table, curves_table

    results = read_json(folder / "results.json")
    assert curves_table(results) == ""
    arm = results["arms"][0]
    arm["cons"] = {"4": {"accuracy": 0.625, "accuracy_ci": [0.5, 0.75]}}
    curves = curves_table(results)
    assert "<th>Cons@4</th>" in curves and "Pass@" not in curves
    assert curves.count("62.5%<small>[50.0, 75.0]</small>") == 1 and curves.count("<td") == len(results["arms"])
    arm |= {"seconds_per_solved": 3.456, "seconds_per_solved_ci": [2.5, None], "forced_mean": 7.25}
    text = costs_table(results)
    assert "3.46<small>[2.50, ∞]</small>" in text and ">7.2<" in text
    write_json(folder / "results.json", results)
    page = write_report(folder).read_text(encoding="utf-8")
    assert text in page and curves in page


def test_report_is_written_again_by_command(folder: Any, capsys: Any) -> None:
    from neureasoner.cli import main

    assert main(["evaluation", "report", str(folder), "--traces", "4"]) == 0
    assert "report.html (" in capsys.readouterr().out
    assert "4 of 80 traces are embedded" in (folder / "report.html").read_text(encoding="utf-8")
    assert main(["evaluation", "report", "--run", ""]) == 2
    assert main(["evaluation", "report", str(folder / "nothing")]) == 2
    assert "results.json" in capsys.readouterr().err


def test_embed_is_inert() -> None:
    assert "<" not in embed(EVIL) and "\u2028" not in embed(EVIL) and json.loads(embed(EVIL)) == EVIL


@pytest.mark.parametrize(
    ("accuracy", "tokens", "words"),
    [
        ((0.1, 0.05, 0.15), (-0.3, -0.4, -0.2), "more right answers for fewer tokens"),
        ((-0.1, -0.15, -0.05), (-0.3, -0.4, -0.2), "fewer right answers for fewer tokens"),
        ((0.1, 0.05, 0.15), (0.3, 0.2, 0.4), "more right answers for more tokens"),
        ((-0.1, -0.15, -0.05), (0.3, 0.2, 0.4), "fewer right answers and more tokens"),
        ((0.1, 0.05, 0.15), (0.0, -0.1, 0.1), "more right answers than vanilla, but no difference in tokens"),
        ((0.1, -0.05, 0.25), (-0.3, -0.4, -0.2), "fewer tokens than vanilla, but no difference in right answers"),
        ((0.1, -0.05, 0.25), (0.0, -0.1, 0.1), "No difference between full and vanilla"),
    ],
)
def test_headline_says_no_more_than_the_intervals(accuracy: Any, tokens: Any, words: str) -> None:
    def sure(value: Any) -> bool:
        return value[1] > 0 or value[2] < 0

    row = {
        "arm": "full",
        "against": "vanilla",
        "accuracy_delta": accuracy[0],
        "accuracy_delta_ci": accuracy[1:],
        "accuracy_shown": sure(accuracy),
        "tokens_relative": tokens[0],
        "tokens_relative_ci": tokens[1:],
        "tokens_shown": sure(tokens),
    }
    assert words in headline({"comparisons": [row], "arms": []})


def test_headline_without_a_comparison_is_a_figure_with_its_intervals() -> None:
    arm = {"name": "vanilla", "accuracy": 0.62, "accuracy_ci": [0.581, 0.659]}
    arm |= {"tokens_mean": 812.4, "tokens_ci": [790.0, 834.0]}
    said = "62.0% right [58.1, 65.9], 812 tokens an answer [790, 834]."
    assert headline({"comparisons": [], "arms": [arm]}) == f"vanilla: {said}"
    other = {"name": "no_thinking", "accuracy": 0.5, "accuracy_ci": [0, 1], "tokens_mean": 1, "tokens_ci": [1, 2]}
    assert headline({"comparisons": [], "arms": [other, arm]}) == f"vanilla: {said}"
    assert headline({"comparisons": [], "arms": [arm | {"name": "full"}]}) == f"full: {said}"


def test_terminal_ending(folder: Any) -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=True, highlight=False)
    show(folder, 3, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)
    assert "answers that vanilla got wrong and full got right" in plain and "vanilla" in plain
    assert "report.html" in plain and "\x1b[1;30;42m<INTRA>" in said, "forced text is coloured"
    assert caution({"problems": {"n": 40}}) in plain


def test_names_in_the_results_do_not_speak_to_the_terminal(folder: Any) -> None:
    results = read_json(folder / "results.json")
    results["arms"] = [*results["arms"][1:], results["arms"][0] | {"name": "\x1b[2J\u061c[bold]"}]
    results["comparisons"], results["problems"]["split"] = [], "\x1b]0;owned\x07[red]"
    write_json(folder / "results.json", results)
    console = Console(file=io.StringIO(), width=140, highlight=False)
    show(folder, 0, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "␛[2J\ufffd[bold]" in said and "split ␛]0;owned␇[red]" in said
    assert not re.search("[\x00-\x09\x0b-\x1f\u061c]", said)
    results["arms"].reverse()
    write_json(folder / "results.json", results)
    show(folder, 0, console)
    assert "\x1b" not in console.file.getvalue(), "the headline is of the first arm"  # type: ignore[attr-defined]


def test_markdown_says_what_the_results_say(folder: Any) -> None:
    results = read_json(folder / "results.json")
    text = markdown(results)
    assert headline(results) in text
    for a in results["arms"]:
        (line,) = (x for x in text.splitlines() if x.startswith(f"| {a['name']} | {100 * a['accuracy']:.1f} ["))
        assert f"| {a['tokens_mean']:.0f} [" in line
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| vanilla")}
    assert len(widths) >= 1 and "nan" not in text.lower()


def test_without_full_every_arm_is_set_against_vanilla() -> None:
    c = {"accuracy_delta": 0.06, "accuracy_delta_ci": [0.01, 0.11], "accuracy_shown": True}
    c |= {"tokens_relative": 0.2, "tokens_relative_ci": [0.1, 0.3], "tokens_shown": True, "against": "vanilla"}
    arms = [{"name": n, "triggers_per_trace": 0.5} for n in ("vanilla", "intra", "no_thinking")]
    rows = [c | {"arm": n} for n in ("intra", "no_thinking", "full")]
    figures = "gains +6.0 points [+1.0, +11.0], +20% tokens [+10%, +30%]."
    said = [f"Against vanilla, {n} {figures}" for n in ("intra", "full")]
    assert said[0] in sentences({"comparisons": rows[:2], "arms": arms})
    assert said[1] not in sentences({"comparisons": rows[2:], "arms": [*arms, arms[0] | {"name": "full"}]})


def test_probes_are_a_table_only_where_something_is_known_of_them() -> None:
    own = {"features": "a|b", "window": 2, "test": {"auroc": {"value": 0.95, "low": 0.9, "high": 1.0}}}
    silent: list[dict[str, Any]] = [own | {"test": t} for t in (None, "w", {}, {"auroc": {"value": "w"}})]
    assert probes_lines({"probes": {}}) == [] == probes_lines({"probes": dict(zip("abcd", silent, strict=True))})
    lines = probes_lines({"probes": {"intra": own, "inter": silent[0]}})
    assert lines[2:] == [
        "| intra | wrong step | a\\|b, window 2 | .95 [0.90, 1.00] | – | – | – |",
        "| inter | circles | a\\|b, window 2 | – | – | – | – |",
    ]
