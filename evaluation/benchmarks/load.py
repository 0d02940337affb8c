"""Rows of a benchmark -> problems: columns found or named as missing, golds checked, questions put into templates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from neureasoner.config import closest
from neureasoner.data_builders.families import FAMILIES
from neureasoner.data_builders.grading.answers import balanced, gold_answer, last_boxed, plain
from neureasoner.data_builders.grading.grade import MAX_GIVEN
from neureasoner.data_builders.sources.readers import HubSet, RawRow, file_rows, hub_rows, input_files, is_hub
from neureasoner.errors import UserError
from neureasoner.evaluation.benchmarks.config import BenchmarkConfig
from neureasoner.evaluation.benchmarks.registry import BENCHMARKS, FUNCTION, LEVELS, RELEASES, Benchmark
from neureasoner.evaluation.benchmarks.suites import keep, suite_of
from neureasoner.traces import Problem

LETTERS = "ABCDEFGHIJ"
_BROKEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # control characters, but for tabs and line ends
_MARK = re.compile(r"(?<![A-Za-z0-9(])\(?([A-J])[).]\s")


def benchmark_of(config: BenchmarkConfig) -> Benchmark:
    """The benchmark that settings mean: one of the registry, changed as they say, or one of the user's own."""
    known = BENCHMARKS.get(config.name)
    if known is None:
        if not config.kind:
            raise UserError(
                f"unknown benchmark '{config.name}'{closest(config.name, BENCHMARKS)} (known: "
                f"{', '.join(BENCHMARKS)}); for one of your own, give 'input', 'columns' and 'kind'"
            )
        if config.name in FAMILIES:
            raise UserError(f"benchmark name '{config.name}' is that of an embedded problem family; choose another")
        if not config.input:
            raise UserError(f"benchmark '{config.name}' needs 'input': a file, or a Hub data set 'org/name'")
        known = Benchmark(config.name, config.kind, {"question": "question", "answer": "answer"})
    columns = dict(known.columns)
    if config.columns:  # the roles of the registry stay only where they are optional
        columns = {r: c for r, c in columns.items() if r not in ("options", "id", "difficulty")} | config.columns
    if known.kind == "code":
        columns.pop("answer", None)
        columns.setdefault("tests", "tests")
    template = known.template
    if config.template:
        path = Path(config.template)
        if not path.is_file():
            raise UserError(f"{path}: no such file (key 'template')")
        template = path.read_text(encoding="utf-8")
        if "{question}" not in template:
            raise UserError(f"{path}: a template needs {{question}} where the question goes")
    return replace(known, columns=columns, template=template)


def release_of(config: BenchmarkConfig, benchmark: Benchmark) -> str:
    """The release of the data, for those that have releases."""
    if not benchmark.files:
        if config.release:
            raise UserError(f"key 'release': benchmark {benchmark.name} has no releases")
        return ""
    release = config.release or ("unstated" if config.input else "release_v5")
    if release not in RELEASES and release != "unstated":
        raise UserError(f"key 'release': unknown release '{release}'; known: {', '.join(RELEASES)}")
    return release


def raw_rows(config: BenchmarkConfig, benchmark: Benchmark) -> Iterator[RawRow]:
    """The rows of a local file, or of the Hub. Raises UserError for what cannot be had."""
    if config.input and not is_hub(config.input):
        yield from file_rows(input_files(config.input))
        return
    if not config.input and benchmark.files:
        names = benchmark.files[: RELEASES[release_of(config, benchmark)]]
        yield from file_rows([_hub_file(benchmark.hub, name, config.revision) for name in names])
        return
    name = config.input.removeprefix("hub:") or benchmark.hub
    subset = "" if config.input else benchmark.config
    try:
        yield from hub_rows(HubSet(name, subset, config.split or benchmark.split, config.revision))
    except UserError as e:
        raise UserError(f"benchmark {benchmark.name}: {e}. Have a local copy? Name it with --input FILE") from None


def _hub_file(repository: str, name: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision or None))
    except Exception as e:  # the client raises its own, requests' and OS errors
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"Hub file '{repository}/{name}': {first}. Have a local copy? Name it with --input FILE"
        ) from None


class Cells:
    """A row seen through the columns of a benchmark."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str], where: str):
        self.row, self.columns, self.where = row, columns, where

    def names(self, role: str, needed: bool) -> list[str]:
        """The columns of a role. Raises UserError naming one that the row lacks, and what it has."""
        names = self.columns.get(role, "").split("+") if self.columns.get(role) else []
        absent = [n for n in names if n not in self.row]
        if absent and needed:
            raise UserError(
                f"{self.where}: no column '{absent[0]}' for the {role}{closest(absent[0], map(str, self.row))}; found "
                f"{', '.join(map(str, self.row))}; name yours as in --columns {role}=COLUMN"
            )
        return [] if absent else names

    def at(self, role: str) -> str:
        """Where a role's value stands, for an error about it."""
        return f"{self.where}, column '{self.columns.get(role, '')}'"

    def text(self, role: str, needed: bool = True, strip: str | None = None) -> str:
        """The text of a role's columns, joined by blanks. ``strip``: what to take off its ends, as in str.strip."""
        values = [self.row[n] for n in self.names(role, needed)]
        return " ".join(_text(v) for v in values if v is not None).strip(strip)

    def values(self, role: str, needed: bool = True) -> list[Any]:
        """The values of a role's columns; one column that holds a list (or a mapping) is that list."""
        values = [self.row[n] for n in self.names(role, needed)]
        if len(values) == 1 and isinstance(values[0], dict):
            values = [values[0].get("text", list(values[0].values()))]
        return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its places filled, in one pass: what a question holds is never a place."""
    return re.sub(r"\{(question|options|starter)\}", lambda m: values.get(m[1], m[0]), template)


def inline_options(question: str) -> tuple[str, list[str]] | None:
    """A question that ends in ``A) … B) … C) …``, parted; None where it does not."""
    marks = list(_MARK.finditer(question))
    best: list[re.Match[str]] = []
    for i, mark in enumerate(marks):
        if mark[1] != "A":
            continue
        run = [mark]
        for other in marks[i + 1 :]:
            if other[1] == LETTERS[len(run) % len(LETTERS)]:
                run.append(other)
        best = run if len(run) > 1 else best  # the last such run: the stem may name options of its own
    if not best:
        return None
    ends = [m.start() for m in best[1:]] + [len(question)]
    return question[: best[0].start()].strip(), [
        question[m.end() : end].strip().rstrip(",;").strip() for m, end in zip(best, ends, strict=True)
    ]


def options_of(cells: Cells) -> tuple[str, list[str], int]:
    """-> (question, options, index of the right one). Raises UserError for a gold that names no option."""
    question, gold = cells.text("question"), cells.text("answer")
    options = [_text(v).strip() for v in cells.values("options") if v is not None]
    if not options:
        parted = inline_options(question)
        if parted is None:
            raise UserError(
                f"{cells.where}: no options; name their columns as in --columns options=A+B+C+D, or write them in the "
                "question as A) … B) …"
            )
        question, options = parted
    if gold in options:
        return question, options, options.index(gold)
    if len(gold) == 1 and gold in LETTERS[: len(options)]:
        return question, options, LETTERS.index(gold)
    if gold.isdigit() and int(gold) < len(options):
        return question, options, int(gold)
    if gold and len(cells.names("options", False)) > 1:  # the columns hold the wrong ones
        return question, [gold, *options], 0
    raise UserError(
        f"{cells.at('answer')}: unanswerable: the gold answer '{gold[:40]}' names none of {len(options)} options"
    )


def math_gold(cells: Cells, benchmark: Benchmark) -> str:
    """The gold answer of a math row. Raises UserError for one that no response could match."""
    cell = cells.text("answer", strip=" \t\r\n")  # a form feed at its start is the \f of \frac, and stays
    gold = gold_answer(cell)
    whole = cell if cell.strip() == gold else gold
    where = f"{cells.at('answer')}: unanswerable"
    if last_boxed(gold) == "" or not plain(gold).strip("{}") or gold.lower() in ("none", "null", "nan", "n/a"):
        raise UserError(f"{where}: the gold answer is empty ('{gold[:40]}')")
    if len(gold) > MAX_GIVEN:
        raise UserError(f"{where}: a gold answer of {len(gold)} characters; none of {MAX_GIVEN} fits")
    if _BROKEN.search(whole):
        raise UserError(
            f"{where}: the gold answer '{whole[:40]}' holds a control character (in JSON, LaTeX needs two backslashes)"
        )
    if not balanced(gold):
        raise UserError(f"{where}: the gold answer '{gold[:40]}' has unbalanced braces")
    if benchmark.gold and not re.fullmatch(benchmark.gold, plain(gold)):
        raise UserError(f"{where}: '{gold[:40]}' is not an answer that {benchmark.name} can have")
    return gold


def code_answer(cells: Cells) -> tuple[str, str]:
    """-> (``tests:…``, starter code)."""
    starter = cells.text("starter", needed=False)
    function = cells.values("function", needed=False)
    name = function[0] if function else ""
    if isinstance(name, str) and name.lstrip().startswith("{"):  # LiveCodeBench's metadata
        try:
            name = json.loads(name)
        except ValueError:
            raise UserError(f"{cells.where}: the function's column is not JSON") from None
    if isinstance(name, dict):
        name = name.get("func_name") or ""
    cells_of = [cells.row[n] for role in ("tests", "hidden") for n in cells.names(role, needed=role == "tests")]
    return keep(suite_of([c for c in cells_of if c not in (None, "")], str(name or ""), cells.where)), starter


def _difficulty(value: str) -> int:
    found = re.search(r"\d+", value)
    return LEVELS.get(value.lower(), int(found[0]) if found else 1)


def problem_of(row: Mapping[str, Any], number: int, where: str, benchmark: Benchmark, seed: int) -> Problem:
    """One row as a Problem. The order of its options depends on ``seed`` and its question alone."""
    cells = Cells(row, benchmark.columns, where)
    question, values, template = cells.text("question"), dict[str, str](), benchmark.ask
    if not question:
        raise UserError(f"{where}: the question is empty")
    if benchmark.kind == "option":
        question, options, right = options_of(cells)
        order = list(range(len(options)))
        Random(f"{seed}-{question}").shuffle(order)
        values["options"] = "\n".join(f"({LETTERS[i]}) {options[o]}" for i, o in enumerate(order))
        answer = LETTERS[order.index(right)]
    elif benchmark.kind == "code":
        answer, values["starter"] = code_answer(cells)
        template = FUNCTION if values["starter"] and not benchmark.template else template
    else:
        answer = math_gold(cells, benchmark)
    own = cells.text("id", needed=False) or str(number)
    name = f"{benchmark.name}/{own.removeprefix(f'{benchmark.name}/')}"
    difficulty = _difficulty(cells.text("difficulty", needed=False))
    return Problem(name, benchmark.name, difficulty, fill(template, {"question": question, **values}), answer)


def visible(text: str) -> str:
    """A text with what a terminal would act on, not show (controls, marks of direction), written as ``\\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def load_problems(config: BenchmarkConfig) -> list[Problem]:
    """The problems of a benchmark. Raises UserError naming the file, the row and the column of what is wrong."""
    benchmark = benchmark_of(config)
    release_of(config, benchmark)
    problems: dict[str, Problem] = {}
    for row in islice(raw_rows(config, benchmark), config.limit or None):
        where = f"{benchmark.name}: {row.file}, row {row.line}"
        if row.value is None:
            raise UserError(f"{where}: {row.problem}")
        try:
            problem = problem_of(row.value, row.number, where, benchmark, config.seed)
            if problem.id in problems:
                raise UserError(
                    f"{where}: id '{problem.id}' occurs twice; name a column of unique ids (--columns id=COLUMN)"
                )
        except UserError as e:  # it quotes the row, which may hold anything
            raise UserError(visible(str(e))) from None
        problems[problem.id] = problem
    if not problems:
        raise UserError(f"benchmark {benchmark.name}: holds no rows")
    return list(problems.values())
