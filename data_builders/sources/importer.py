"""``data import``: a corpus in any common format -> references.jsonl, streamed in parts; nothing is lost by a kill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from neureasoner.artifacts import file_fingerprint, fingerprint, write_json
from neureasoner.data_builders.grading.verifier import MathVerifier, Verifier
from neureasoner.data_builders.sources.benchmarks import INDEX_SUFFIX, benchmark_of, load_benchmarks
from neureasoner.data_builders.sources.config import ImportConfig
from neureasoner.data_builders.sources.conversion import IDS, REFERENCES, REMOVED, SET_ASIDE, Importer, parts
from neureasoner.data_builders.sources.formats import detect
from neureasoner.data_builders.sources.output import PartFiles
from neureasoner.data_builders.sources.readers import HubSet, RawRow, file_rows, hub_rows, input_files, is_hub
from neureasoner.data_builders.sources.selection import Selector
from neureasoner.errors import UserError
from neureasoner.stages import StageFolder

PEEK = 100  # rows by which the format is told


@dataclass
class _Settings(ImportConfig):
    """The settings as the stage folder compares them: with what the input files hold, without what changes no row."""

    content: str = ""


class Source:
    """The input of an import: which rows it yields and what identifies its content."""

    def __init__(self, config: ImportConfig):
        self.hub: HubSet | None = None
        self.files: list[Path] = []
        if is_hub(config.input):
            self.name = config.input.removeprefix("hub:")
            self.hub = HubSet(self.name, config.hub_config, config.split, config.revision)
        else:
            self.files = input_files(config.input)
            self.name = Path(config.input).name.split(".")[0] or Path(config.input).resolve().name
        self.label = config.source or self.name

    def rows(self, skip: int = 0) -> Iterator[RawRow]:
        """Raw rows after the first ``skip``."""
        return hub_rows(self.hub, skip) if self.hub else file_rows(self.files, skip)

    def fingerprint(self) -> str:
        """Hash of the files' content; of a Hub data set, its name, configuration, split and revision."""
        return fingerprint(vars(self.hub)) if self.hub else file_fingerprint(self.files)


def _benchmark_files(config: ImportConfig) -> list[Path]:
    found = []
    for spec in config.benchmarks:
        path = benchmark_of(spec).path
        found += [path] if path.suffix == INDEX_SUFFIX and path.is_file() else input_files(path)
    return found


def import_corpus(config: ImportConfig, verifier: Verifier | None = None) -> dict[str, Any]:
    """Stage ``data import`` (core.md §1.8, corpus). Writes references.jsonl (``rows.SourceRow``), removed.jsonl,
    set_aside.jsonl and summary.json, and returns the summary.

    ``verifier`` compares answers in place of math-verify. Memory holds one part of the input, the index, and 8 bytes
    for every row that has an id of its own. Raises UserError for an input that no known format fits.
    """
    source = Source(config)
    content = fingerprint(source.fingerprint(), file_fingerprint(_benchmark_files(config)))
    settings = _Settings(**{**vars(replace(config, workers=1)), "content": content})
    folder = StageFolder(config.out, "data import", settings)
    if folder.done:
        return folder.summary
    peeked = [r.value for r in islice(source.rows(), PEEK)]
    if not peeked:
        raise UserError(f"{config.input}: holds no rows")
    known = [v for v in peeked if v is not None]
    form = detect(known, config.input, config.format, config.columns, config.untagged)
    index = load_benchmarks(config.benchmarks, config.benchmark_column, config.private) if config.benchmarks else None
    with ExitStack() as stack:
        if config.select == "all":
            verifier = None
        elif verifier is None:
            verifier = stack.enter_context(MathVerifier(config.workers, config.verify_timeout))
        files = stack.enter_context(PartFiles(folder.path, [REFERENCES, REMOVED, SET_ASIDE, IDS]))
        importer = Importer(config, source.label, form, Selector(config, index, verifier), _tokenizer(config))
        _run(config, source, importer, files)
        summary = {**importer.summary(), "source": source.label, "shard": config.shard or "1/1", "seed": config.seed}
        files.publish(drop=[IDS])
    write_json(folder.path / "summary.json", summary)
    print(described(summary))
    result = folder.finish(summary)
    files.clear()
    return result


def _run(config: ImportConfig, source: Source, importer: Importer, files: PartFiles) -> None:
    """Read on from where the last run stopped, to the end or the limit."""
    from neureasoner.progress import Progress

    done = 0
    if files.state:
        ids = files.partial(IDS)
        importer.restore(files.state, ids.read_bytes() if ids.is_file() else b"")
        done = files.state["rows"]
        if files.state["end"]:
            return
    rows = islice(source.rows(done), max(0, config.limit - done) if config.limit else None)
    with Progress(transient=True) as bar:
        task = bar.add_task("importing", total=None)
        for part in parts(rows):
            data = importer.part(part)
            done += len(part)
            files.commit(data, {"rows": done, "end": False, **importer.state()})
            bar.update(task, completed=done, so_far=f"{importer.counts['kept']} kept")
    files.commit({}, {"rows": done, "end": True, **importer.state()})


def _tokenizer(config: ImportConfig) -> Any:
    if not config.tokenizer:
        return None
    from neureasoner.models import load_tokenizer

    return load_tokenizer(config.tokenizer)


def described(summary: dict[str, Any]) -> str:
    """The summary in a few lines, for a terminal."""
    lines = [f"{summary['read']} rows read, {summary['kept']} kept"]
    for key, title in (("removed_reasons", "removed"), ("set_aside_reasons", "set aside"), ("benchmarks", "found in")):
        if summary[key]:
            lines.append(f"  {title}: " + ", ".join(f"{v} {k}" for k, v in summary[key].items()))
    return "\n".join(lines)
