"""Rows and models small enough to train on in a test."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neureasoner.data_builders.layouts import InterBlock, IntraBlock, Reconstruction, compose
from neureasoner.traces import Problem, write_rows

INTRA_BLOCK = IntraBlock("Wait, a step above is wrong.", "3 + 4 = 8", "The sum of 3 and 4 is 7, not 8.")
INTER_BLOCK = InterBlock("I am going in circles.", "I tried 3 + 4 again", "The sum stays 7.", "Now I multiply first.")


def _row(level: str, number: int = 0, steps: int = 1) -> Reconstruction:
    problem = Problem(f"p{number}", "sum", 1, f"What is 3 + 4 + {number}?", str(7 + number))
    before = ["Let me see.", *["I take it step by step."] * steps]
    ending = f"</think>\n\nThe answer is \\boxed{{{7 + number}}}"
    after = ["Again: 3 + 4 = 7.", f"So it is {7 + number}."]
    if level == "plain":
        text = "\n\n".join([*before, *after]) + "\n" + ending
        return Reconstruction(f"r{number}", problem, level, problem.question, text)
    failure = ["First 3 + 4 = 8."] if level == "intra" else ["Try 3 + 4.", "Back to 3 + 4.", "Once more 3 + 4."]
    made = compose(before, failure, INTRA_BLOCK if level == "intra" else INTER_BLOCK, after, ending)
    return Reconstruction(f"r{number}", problem, level, problem.question, **made)


@pytest.fixture
def make_row() -> Callable[..., Reconstruction]:
    """``make_row(level, number=0, steps=1)``: one row; ``number`` names its problem, ``steps`` makes it longer."""
    return _row


@pytest.fixture
def own_tokenizer(tiny_tokenizer: Any) -> Any:
    """A tokenizer this test may add tokens to."""
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    """Twelve rows of all levels and several lengths."""
    path = tmp_path / "train.jsonl"
    write_rows(path, [_row(("intra", "inter", "plain")[i % 3], i, 1 + i % 4) for i in range(12)])
    return path


@pytest.fixture
def model_folder(tmp_path: Path, make_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A random model and its tokenizer on disk."""
    make_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
