r"""Final answers as text: where they stand, and the comparisons that need no algebra.

What is decided here is what cannot be wrong: equal text, two whole numbers, two option letters. Everything else goes to
math-verify (``verifier.py``).
"""

from __future__ import annotations

import re
from collections import deque

_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\(?:boxed|fbox)\s*(?P<bare>[^\s$\\{}]+)|\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"(?:^|\n)####[ \t]*([^\s#][^\n]*?)\s*\Z")
_DROPPED = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! $]|[\s$~]|\\[()\[\]]")
_WRAPPED = re.compile(r"\\(?:text|math)(?:bf|it|rm|sf|tt|normal)?\{([^{}]*)\}|\\(?:emph|mbox)\{([^{}]*)\}")
_WHOLE = re.compile(r"[-+]?(?:\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)(?:\.0*)?")
_LETTER = re.compile(r"\(?([A-J])\)?[.:]?")
# A number in running text. None: exponents, parts of words (m^2, m2, CO2). A minus after a value is no sign.
_DIGITS = r"(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)(?<!\.)\.\d+"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}%^.])[-\u2212])?(?:\\?\$(?P<inner>[-\u2212])?)?"
    r"(?:\\[dt]?frac\{(?P<over>\d+)\}\{(?P<under>\d+)\}"
    rf"|(?<![\w^])(?<!\^[-{{])(?<!\^\{{-)(?<!\d\.)(?P<value>{_DIGITS})(?:/(?P<below>\d+))?)",
    re.ASCII,
)
_GOLD_NUMBER = re.compile(rf"[-+]?(?:{_DIGITS})")
_WORD = re.compile(r"[a-z][a-z'’-]+(?:/[a-z]+)?|a")
# Words that make another number of the one beside them, or put another one beside it.
_CHANGES = re.compile(
    r"and|or|to|not|than|least|most|over|under|between|times|plus|minus|negative|squared|cubed|root|twice|double|triple"
    r"|hal(?:f|ves)|(?:third|quarter|dozen|hundred|thousand|million|billion)s?"
    r"|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
)
TESTS = "tests:"  # begins the gold answer of a program: the name of its test set
MAX_ANSWER = 2000  # characters; longer "answers" are not answers
NESTED = 8  # wrappers around a wrapper; no answer has as many
TAIL = 600  # characters at the end of an answer part in which an unboxed answer is looked for


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed`` whose braces balance; a bare ``\boxed 5`` gives ``5``. Linear in the text."""
    start, found = -1, None
    opened: list[int] = []  # where the content of each open group begins if it is a box, else -1
    for match in _BRACES.finditer(text):
        if match["box"]:
            opened.append(match.end())
        elif match["bare"]:
            start, found = match.end(), match["bare"]
        elif match[0] == "{":
            opened.append(-1)
        elif match[0] == "}" and opened and (begin := opened.pop()) > start:
            start, found = begin, text[begin : match.start()].strip()
    return found


def balanced(text: str) -> bool:
    r"""Whether every brace has its partner; ``\{`` and ``\}`` are none."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0


def gold_of_chain(text: str) -> str | None:
    """What follows ``####`` in the last line, as GSM8K writes it. Elsewhere ``####`` is a heading."""
    found = _HASHES.search(text[-TAIL:])
    return found[1] if found else None


def final_answer(solution: str) -> tuple[str, bool]:
    r"""What a response answers, and whether it was marked as the answer.

    The last ``\boxed``, else what follows ``####``, else the end of the text, in which a verifier may look for an
    expression (then it is not marked).
    """
    boxed = last_boxed(solution)
    if boxed is not None:
        return boxed, True
    hashed = gold_of_chain(solution)
    if hashed is not None:
        return hashed, True
    return solution.rstrip()[-TAIL:], False


def gold_answer(text: str) -> str:
    """The gold answer of a cell: what is boxed or follows ``####``, else all of it."""
    return last_boxed(text) or gold_of_chain(text) or text.strip()


def unwrapped(text: str, by: str = "") -> str:
    r"""A text in which what ``\text{…}``, ``\mathbf{…}`` and the like hold stands alone, with ``by`` on either side.

    Linear in the text: wrappers around more than ``NESTED`` others stay.
    """
    for _ in range(NESTED + 1):
        previous, text = text, _WRAPPED.sub(lambda m: f"{by}{m[1] if m[1] is not None else m[2]}{by}", text)
        if text == previous:
            break
    return text


def plain(answer: str) -> str:
    r"""The answer without spacing, dollar signs, ``\text`` wrappers and a final full stop."""
    answer = unwrapped(answer).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _DROPPED.sub("", answer).rstrip(".")


def whole_number(answer: str) -> int | None:
    """The value of a whole number (``1,234``, ``27.0``); None for anything else."""
    text = plain(answer)
    if len(text) > 40 or not _WHOLE.fullmatch(text):
        return None
    return int(re.sub(r"[,{}]", "", text).split(".")[0])


def is_number(gold: str) -> bool:
    """Whether a gold answer is a number in figures: ``1,200.5``, ``-3``."""
    return _GOLD_NUMBER.fullmatch(plain(gold)) is not None


def last_number(text: str) -> str | None:
    r"""The last number of a text without ``$``, commas and units: ``$1,200.50 a year`` -> ``1200.50``.

    A fraction is one number (``1/2``, ``\frac{1}{2}``). None where there is none. Linear in the text.
    """
    last = deque(_NUMBER.finditer(text), maxlen=1)
    if not last:
        return None
    found = last[0]
    sign = "-" if found["sign"] or found["inner"] else ""
    over, under = found["over"] or re.sub(r"[,{}]", "", found["value"]), found["under"] or found["below"]
    return f"{sign}{over}/{under}" if under else sign + over


def with_unit(marked: str) -> str | None:
    r"""The number of a marked answer that is one number with plain words about it: ``\text{$18 a day}`` -> ``18``.

    None for anything else, be it the number alone. Words that change a number (half, dozen, not) or put another beside
    it (or) are not plain, nor is a letter (``18x``, ``18 x``), but for the article. Linear in the text.
    """
    text = re.sub(r"\\!|[*]", "", unwrapped(marked, " "))
    text = re.sub(r"\\[,;: ()\[\]]|~", " ", text)
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    before, after = text[: found[0].start()], text[found[0].end() :]
    if re.search(r"\S\Z", before) or re.match(r"[\w%^/]", after):
        return None
    stripped = (word.strip("$.,;:!").lower() for word in (before + after).split())
    words = [word for word in stripped if word]
    alone = all(_WORD.fullmatch(word) and not _CHANGES.fullmatch(word) for word in words)
    return last_number(text) if words and alone else None


def option_letter(gold: str) -> str | None:
    r"""The option that a gold answer is: ``B``, ``(B)``, ``\text{B}``; None for any other answer."""
    match = _LETTER.fullmatch(plain(gold))
    return match[1] if match else None
