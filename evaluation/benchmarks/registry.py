"""The benchmarks: where they are, which columns hold what, how they are asked, which golds can be right.

A benchmark is a value of ``Benchmark``; a new one is a new entry here, or a file with ``columns``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BOXED = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = (
    "{question}\n\n{options}\n\n"
    "Please reason step by step, and put the letter of the one right option within \\boxed{}, as in \\boxed{X}."
)
PROGRAM = (
    "{question}\n\n"
    "Write a correct Python 3 program that reads the input from stdin and writes the answer to stdout. "
    "Give the whole program in one code block at the end:\n```python\n# your code here\n```"
)
FUNCTION = (
    "{question}\n\n"
    "Write a correct Python 3 solution with this starter code. Give the whole solution in one code block at the end:\n"
    "```python\n{starter}\n```"
)
TEMPLATES = {"math": BOXED, "option": LETTER, "code": PROGRAM}
RELEASES = {f"release_v{i}": i for i in range(1, 7)}  # LiveCodeBench: release i is files 1 to i
LEVELS = {"easy": 1, "medium": 2, "hard": 3}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. ``columns``: role -> column, ``a+b`` for several; ``gold``: what every gold answer looks like.

    ``size``: items of the whole set, where it is fixed. ``private``: its authors ask that no item be shown in public.
    """

    name: str
    kind: str
    columns: Mapping[str, str]
    hub: str = ""
    config: str = ""
    split: str = "test"
    files: tuple[str, ...] = ()
    gold: str = ""
    size: int = 0
    private: bool = False
    template: str = ""

    @property
    def ask(self) -> str:
        """The prompt template."""
        return self.template or TEMPLATES[self.kind]


_MATH = {"question": "problem", "answer": "answer"}
_INTEGER = r"0*\d{1,3}(?:\.0*)?"

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark(
            "gsm8k",
            "math",
            {"question": "question", "answer": "answer"},
            "openai/gsm8k",
            "main",
            gold=r"[-+]?\d[\d,]*(?:\.\d+)?",
            size=1319,
        ),
        Benchmark(
            "math500",
            "math",
            {**_MATH, "id": "unique_id", "difficulty": "level"},
            "HuggingFaceH4/MATH-500",
            size=500,
        ),
        Benchmark(
            "aime24", "math", {**_MATH, "id": "id"}, "HuggingFaceH4/aime_2024", split="train", gold=_INTEGER, size=30
        ),
        Benchmark("aime25", "math", {**_MATH, "id": "id"}, "math-ai/aime25", gold=_INTEGER, size=30),
        Benchmark(
            "gpqa_diamond",
            "option",
            {
                "question": "Question",
                "answer": "Correct Answer",
                "options": "Incorrect Answer 1+Incorrect Answer 2+Incorrect Answer 3",
                "id": "Record ID",
            },
            "Idavidrein/gpqa",
            "gpqa_diamond",
            split="train",
            size=198,
            private=True,
        ),
        Benchmark(
            "livecodebench",
            "code",
            {
                "question": "question_content",
                "id": "question_id",
                "difficulty": "difficulty",
                "starter": "starter_code",
                "tests": "public_test_cases",
                "hidden": "private_test_cases",
                "function": "metadata",
            },
            "livecodebench/code_generation_lite",
            files=("test.jsonl", *(f"test{i}.jsonl" for i in range(2, 7))),
        ),
    )
}
