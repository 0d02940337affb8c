r"""Text as a benchmark comparison sees it: case, white space, punctuation and LaTeX spacing do not count.

``tokens`` keeps the operators, so that ``3 + 4`` and ``3 - 4`` stay different questions; ``words`` are the tokens that
are numbers or words, of which n-grams are made. A number and a letter beside it are two words, however they are spaced.
"""

from __future__ import annotations

import re
import unicodedata

_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "—": " ", "×": "*", "⋅": "*", "·": "*", "∗": "*", "÷": "/", "⁄": "/", "≤": "<=", "≥": ">=",
     "≠": "!=", "’": "'", "\u200b": "", "\u200e": "", "\u200f": "", "\ufeff": "", "\u00ad": ""}
)  # fmt: skip
# Layout commands of LaTeX, which say nothing about the mathematics.
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|quad|qquad|limits|bigl?|bigr?|biggl?|biggr?)(?![a-z])"
    r"|\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|boxed|mbox)(?=\s*\{)"
    r"|\\(?:begin|end)\s*\{[a-z]+\*?\}(?:\{[lcr|]+\})?|\\[,;:!> ]|\\\\|[~$]"
)
_COMMANDS = (
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-z])"), "*"),
    (re.compile(r"\\div(?![a-z])"), "/"),
    (re.compile(r"\\leq?(?:slant)?(?![a-z])"), "<="),
    (re.compile(r"\\geq?(?:slant)?(?![a-z])"), ">="),
    (re.compile(r"\\neq?(?![a-z])"), "!="),
    (re.compile(r"\\[lg]t(?![a-z])"), lambda m: "<" if "l" in m[0] else ">"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\{,\}"), ","),
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|[^\W\d_]+|<=|>=|!=|(?<=[\w)])!(?=\s*[-+*/=)])|[-+*/=<>^%]")
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # Chinese and Japanese: each sign is a word
# What corpora add to a question to shape the answer; it is no part of the question.
_INSTRUCTIONS = re.compile(
    r"^\s*return your final response within \\boxed\{\}\.?"
    r"|^\s*(?:question|problem)\s*:"
    r"|(?:please )?reason step by step,? and put your final answer within \\boxed\{\}\.?\s*$"
    r"|(?:please )?put your final answer (?:with)?in \\boxed\{\}\.?\s*$",
    re.IGNORECASE,
)


def bare_question(text: str) -> str:
    """The question without the instructions on the form of the answer that corpora put around it."""
    return _INSTRUCTIONS.sub(" ", text)


def tokens(text: str) -> list[str]:
    """Words, numbers and operators of a text, normalised."""
    if not text.isascii():
        text = _UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text).translate(_SIGNS))
    text = text.casefold()
    if any(c in text for c in "\\${~"):
        for pattern, sign in _COMMANDS:
            text = pattern.sub(sign, text)  # type: ignore[arg-type]
        text = _LAYOUT.sub(" ", text)
    text = _THOUSANDS.sub("", text)
    return _TOKEN.findall(_HYPHEN.sub(" ", text))


def is_word(token: str) -> bool:
    """Whether a token is a number or a word, and no operator."""
    return token[-1].isalnum()


def words(text: str) -> list[str]:
    """The numbers and words of a text, normalised."""
    return [t for t in tokens(text) if is_word(t)]
