"""The report in a real headless browser: fast, inert, and every promised view of a trace."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neureasoner.artifacts import read_tensors, write_text
from neureasoner.evaluation.examples import KINDS, UNJUDGED
from neureasoner.evaluation.report import write_report
from neureasoner.traces import Trace

HOSTILE_PROBLEM = 7
LEFT, RIGHT = 34, 8  # of a timeline, as plots.js draws it


@pytest.fixture
def page(browser: Any, run: Path) -> Iterator[Any]:
    """The report, freshly opened; afterwards nothing went wrong in it and nothing left it."""
    browser.dark(False)
    browser.size(1500, 1000)
    browser.open(run / "report.html")
    yield browser
    assert browser.problems == []
    assert browser.js("window.hacked") is None


def choose(page: Any, name: str, value: str) -> None:
    page.js(f"(() => {{ const s = document.getElementById('f-{name}'); s.value = {json.dumps(value)};"
            " s.dispatchEvent(new Event('change')); })()")  # fmt: skip


def find(page: Any, problem: str) -> None:
    """Show one problem."""
    page.js(
        "(() => { const rows = JSON.parse(document.getElementById('data').textContent).rows"
        ".filter((r) => r.arm === document.getElementById('f-arm').value);"
        f" const at = rows.findIndex((r) => r.problem === {json.dumps(problem)});"
        " document.querySelectorAll('#list li')[at].click(); })()"
    )


def press(page: Any, selector: str) -> None:
    """Click, with the mouse, on something that is scrolled into sight first."""
    page.js(f"document.querySelector('{selector}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
    page.click(selector)


def texts(page: Any, selector: str) -> list[str]:
    return list(page.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)"))


def test_paints_within_a_second_and_shows_16000_tokens(page: Any, run: Path) -> None:
    painted = [page.first_paint()]
    while min(painted) >= 1000 and len(painted) < 10:  # the best of some: other work on the machine is not the page's
        page.open(run / "report.html")
        painted.append(page.first_paint())
    assert min(painted) < 1000, painted
    assert texts(page, ".side .meta")[1].startswith("16,000 tokens · 700 steps")
    assert len(texts(page, ".side:last-child .step")) == 701
    assert page.js("document.querySelectorAll('#list li').length") == 100
    took = page.js(
        "(() => { const t = performance.now(), rows = document.querySelectorAll('#list li'); rows[5].click();"
        " rows[0].click(); document.body.offsetHeight; return performance.now() - t; })()"
    )
    assert took < 3000, f"{took} ms to show two traces"


def test_hostile_text_is_only_ever_text(page: Any, traces: dict[str, list[Trace]]) -> None:
    text = traces["full"][HOSTILE_PROBLEM].response.encode("utf-8", "replace").decode()
    find(page, traces["full"][HOSTILE_PROBLEM].problem.id.encode("utf-8", "replace").decode())
    assert texts(page, ".ask")[0].startswith(traces["full"][HOSTILE_PROBLEM].problem.question[:20])
    shown = "".join(texts(page, ".side:last-child .step"))
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text), "all of it, and as it was written"
    assert (
        page.js("document.querySelectorAll('main img, main iframe, main script, main .viewer a, main b b').length") == 0
    )
    assert page.js("document.querySelectorAll('body > script').length") == 202, "index, 200 traces, the page's own"
    assert page.js("document.title") == "NeuReasoner report"
    assert (
        page.js(
            "[...document.querySelectorAll('*')].some((e) => e.getAttributeNames().some((n) => n.startsWith('on')))"
        )
        is False
    )


def test_no_script_but_the_page_s_own_may_run(page: Any) -> None:
    page.js(
        "(() => { const s = document.createElement('script'), box = document.createElement('div');"
        " s.textContent = 'window.hacked = 1'; box.innerHTML = '<img src=x onerror=window.hacked=1>';"
        " document.body.append(s, box); })()"
    )
    page.until("document.images.length === 1 && document.images[0].complete")
    assert page.js("window.hacked") is None
    assert any("Content Security Policy" in p for p in page.problems), "the browser refused"
    page.problems.clear()


def expected(kind: str, i: int) -> bool:
    """What the fixture made problem i in the arm full, by rule of arithmetic."""
    right, vanilla = i == 0 or i % 2 == 0, i > 0 and i % 3 == 0
    error, acted = i % 5 == 0, i == 0 or i % 4 == 0 or i % 10 in (1, 5)
    intra = i == 0 or (i % 4 != 0 and i % 10 in (1, 5))
    return {
        "to_right": right and not vanilla,
        "to_wrong": vanilla and not right,
        "false_alarm": intra and not error,
        "missed": error and not intra,
        "right": right,
        "wrong": not right,
        "acted": acted,
        "error": error,
        "circle": False,
        "cut": False,
    }[kind]


def test_filters(page: Any) -> None:
    for kind in KINDS:
        choose(page, "kind", kind)
        wanted = [i for i in range(100) if expected(kind, i)]
        shown = sorted(int(m[1]) for t in texts(page, "#list li") if (m := re.search(r"Question (\d+)\?", t)))
        assert shown == [i for i in wanted if i != HOSTILE_PROBLEM], kind
        assert texts(page, ".empty") == ([] if wanted else ["No trace fits these filters."])
        choose(page, "family", "words")
        assert page.js("document.querySelectorAll('#list li').length") == sum(i % 2 for i in wanted)
        choose(page, "family", "")


def test_search_reads_questions_and_responses(page: Any) -> None:
    for words, count in (("Question 42?", 1), ("1 + 1 = 3", 20), ("no such words", 0)):
        page.js(f"(() => {{ const s = document.getElementById('f-search'); s.value = {json.dumps(words)};"
                " s.dispatchEvent(new Event('input')); })()")  # fmt: skip
        page.until(f"document.getElementById('count').textContent === '{count} shown'")


def test_keyboard(page: Any) -> None:
    def row() -> int:
        return int(page.js("[...document.querySelectorAll('#list li')].findIndex((e) => e.ariaSelected === 'true')"))

    def step() -> list[int]:
        sides = "[...document.querySelectorAll('.text')]"
        return list(page.js(f"{sides}.map((s) => [...s.children].findIndex((e) => e.ariaSelected === 'true'))"))

    page.key("j")
    page.key("j")
    page.key("k")
    assert row() == 1
    page.js("document.getElementById('list').focus()")
    page.key("ArrowDown")
    assert row() == 2
    page.js("document.querySelectorAll('#list li')[0].click()")
    assert step() == [40, 40], "the wrong step, and the step after which the rule stepped in"
    page.key("l")
    page.key("l")
    page.key("h")
    assert step() == [40, 41]
    page.key("e")
    assert step() == [40, 40]
    page.key("s")
    page.key("ArrowRight")
    assert step() == [41, 40], "the other side has the keys"
    visible = "(() => { const t = document.querySelector('.text').getBoundingClientRect(), e = document.querySelector("
    visible += (
        "'.text [aria-selected=true]').getBoundingClientRect(); return e.top >= t.top && e.bottom <= t.bottom; })()"
    )
    assert page.js(visible), "a chosen step is scrolled into sight"
    page.key("/")
    assert page.js("document.activeElement.id") == "f-search"
    page.key("j")
    assert row() == 0, "keys typed into the search are words"
    page.key("Escape")
    page.js("(() => { const s = document.getElementById('f-search'); s.value = ''; })()")
    page.key("f")
    assert page.js("document.getElementById('f-kind').value") == "to_right"


def test_marks_are_where_the_judge_and_the_controller_say(page: Any) -> None:
    find(page, "p5")
    assert texts(page, ".side mark") == ["1 + 1 = 3", "1 + 1 = 3"], "offsets count code points"
    assert texts(page, ".side b") == ["<INTRA>"]
    assert page.js("[...document.querySelectorAll('.side:last-child .step')].map((e) => e.className)") == [
        "step ", "step wrong", "step block", "step ", "step answer",
    ]  # fmt: skip
    find(page, "p10")
    assert "missed: intra" in texts(page, ".side .meta")[1]
    find(page, "p1")
    assert "false alarm: intra" in texts(page, ".side .meta")[1]


def test_curve_and_events_stand_at_their_tokens(page: Any) -> None:
    find(page, "p5")
    svg = "document.querySelector('.side:last-child .timeline svg')"
    width = page.js(f"{svg}.viewBox.baseVal.width")
    place = [LEFT + t / 40 * (width - LEFT - RIGHT) for t in (8, 16, 24, 32)]
    points = page.js(f"{svg}.querySelector('.p-line').getAttribute('d')")
    drawn = [tuple(map(float, p.split(","))) for p in points[1:].split("L")]
    assert [x for x, _ in drawn] == pytest.approx(place, abs=0.06)
    levels = [y for _, y in drawn]
    assert levels == sorted(levels, reverse=True), "scores 0, .1, .2, .3 rise"
    dots = page.js(f"[...{svg}.querySelectorAll('circle title')].map((e) => e.textContent)")
    assert dots[3] == "intra after step 4: 0.3, threshold 0.65"
    assert float(page.js(f"{svg}.querySelector('.p-event').getAttribute('x1')")) == pytest.approx(place[1], abs=0.06)
    assert page.js(f"{svg}.querySelectorAll('.p-forced').length") == 1
    # where nothing watched, the details' scores stand, and the page says so
    assert "computed afterwards" in texts(page, ".side .meta")[0]
    assert len(page.js("document.querySelector('.side .p-line').getAttribute('d')").split("L")) == 2


def test_click_on_a_step_shows_its_spectrum(page: Any, run: Path) -> None:
    tensors, meta = read_tensors(run / "details.safetensors")
    for level, problem, step in (("intra", "p5", 2), ("inter", "p12", 0)):
        choose(page, "level", level)
        find(page, problem)
        press(page, f".side:last-child .step:nth-child({step + 1})")
        label = page.js("document.querySelector('.side:last-child .bars svg').getAttribute('aria-label')")
        assert label.startswith(f"spectrum of step {step + 1}: ")
        entry = meta["traces"][f"full/{problem}#0"]
        share = tensors[f"{level}.spectrum"][entry["steps"][0] + step].float().tolist()
        bars = "[...document.querySelectorAll('.side:last-child .p-bar')].map((e) => +e.getAttribute('height'))"
        heights = page.js(bars)
        scale = max(share) / max(heights)
        assert [h * scale for h in heights] == pytest.approx(share, abs=0.02 * max(share))


def test_spectrogram_is_the_recording(page: Any, run: Path) -> None:
    tensors, meta = read_tensors(run / "details.safetensors")
    for problem in ("p0", "p12"):
        find(page, problem)
        alpha = page.js(
            "(() => { const c = document.querySelector('.side:last-child canvas'), d = c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data;"
            " return [c.width, c.height, [...d].filter((_, i) => i % 4 === 3)]; })()"
        )
        a, b = meta["traces"][f"full/{problem}#0"]["columns"]
        assert alpha[:2] == [b - a, 5]
        assert alpha[2] == tensors["intra.heat"][a:b].T.flatten().tolist()


def test_a_click_in_the_timeline_chooses_the_step(page: Any) -> None:
    find(page, "p12")
    press(page, ".side:last-child .timeline svg")
    assert "step 3 of 4 · tokens 16 to 23" in texts(page, ".note")[1], "token 20 of 40 is in the third"


def test_light_and_dark(page: Any, run: Path) -> None:
    look = "['background-color', '--heat'].map((k) => getComputedStyle(document.body).getPropertyValue(k))"
    light = page.js(look)
    page.dark(True)
    dark = page.js(look)
    assert dark[0] != light[0] and dark[1] != light[1]
    page.click("#theme")
    assert page.js(look) == light, "the button overrides the system"
    picture = "document.querySelector('.side:last-child canvas').getContext('2d').getImageData(0, 0, 5, 5).data"
    pixel = f"[...{picture}].filter((_, i) => i % 4 < 3)"
    before = page.js(pixel)
    page.click("#theme")
    assert page.js(look) == dark and page.js(pixel) != before, "the picture of the neurons follows"


def test_narrow_and_print(page: Any, run: Path, tmp_path: Path) -> None:
    page.size(400, 800)
    page.open(run / "report.html")
    assert page.js("document.documentElement.scrollWidth") <= 400
    page.size(1200, 900)
    page.call("Emulation.setEmulatedMedia", media="print")
    find(page, "p0")
    whole = "(() => { const t = document.querySelector('.text'); return t.clientHeight >= t.scrollHeight; })()"
    assert page.js(whole) and page.js("getComputedStyle(document.querySelector('header')).display") == "none"
    page.call("Emulation.setEmulatedMedia", media="")
    page.pdf(tmp_path / "page.pdf")
    pages = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes()))
    assert pages > 10, "all of the 16,000 tokens are printed"


def test_without_details_nothing_is_promised(page: Any, run: Path, tmp_path: Path) -> None:
    for name in ("results.json", "traces"):
        (tmp_path / name).symlink_to(run / name)
    page.open(write_report(tmp_path, 20))
    assert page.js("document.getElementById('f-level').parentElement.hidden") is True
    assert page.js("document.querySelectorAll('canvas').length") == 0
    assert "`neureasoner evaluation details` does it" in page.js("document.getElementById('traces').textContent")
    page.key("l")
    assert "step" in texts(page, ".note")[0]


def test_an_empty_filter_says_why_where_no_step_was_judged(page: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").symlink_to(run / "results.json")
    for arm in ("vanilla", "full"):
        text = (run / "traces" / f"{arm}.jsonl").read_text().replace('"judge": "exact"', '"judge": "answer"')
        text = text.replace('"has_error": true', '"has_error": false')
        write_text(tmp_path / "traces" / f"{arm}.jsonl", text)
    page.open(write_report(tmp_path, 20))
    for kind in ("false_alarm", "missed", "error", "circle", "cut"):
        choose(page, "kind", kind)
        said = ["No trace fits these filters." + (f" 10 of 10 were {UNJUDGED}." if kind != "cut" else "")]
        assert texts(page, ".empty") == said, kind
