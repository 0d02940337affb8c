r"""Final answers as text: where they stand, and the comparisons that need no algebra.

What is decided here is what cannot be wrong: equal text, two whole numbers, two option letters. Everything else goes to
math-verify (``verifier.py``).
"""

from __future__ import annotations

import re
from collections import deque

_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\(?:boxed|fbox)\s*(?P<bare>[^\s$\\{}]+)|\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"(?:^|\n)####[ \t]*([^\s#][^\n]*?)\s*\Z")
_DROPPED = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! ]|[\s$~]|\\[()\[\]]")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textrm)\{([^{}]*)\}")
_WHOLE = re.compile(r"[-+]?(?:\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)(?:\.0*)?")
_LETTER = re.compile(r"\(?([A-J])\)?[.:]?")
# In running text only capitals, and no I: "the answer is a number", "the answer is, I think, 5" name no option.
_SAID = re.compile(
    r"(?i:answer|option|choice)\s*(?i:is|:)?\s*(?i:option\s+|choice\s+)?[*_\s]*\(?([A-H])\)?[*_]*(?![\w(])"
)
# Where only a letter is wanted: "the answer must be C" weighs more than "option A", wherever they stand.
_PICKED = r"[*_$\s]*(?:\\(?:text|mathrm|mathbf)\{)?\(?([A-J])(?![\w'’])"
_ANSWERED = re.compile(
    r"(?i:answer)[*_]*(?:\s+(?i:is|must be|should be|would be|has to be|choice|option|letter))*\s*[:=]?" + _PICKED
)
_OPTION = re.compile(r"(?i:option|choice)\s*[:=]?" + _PICKED)
_ALONE = re.compile(r"[*_$\s]*\(?([A-J])\)?[.:]?[*_$\s]*")
_LED = re.compile(r"\(?([A-J])(?:\)|[.:](?=\s))")
# A number in running text. None: exponents, parts of words (m^2, m2, CO2). A minus after a value is no sign.
_DIGITS = r"(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)(?<!\.)\.\d+"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}%^.])[-\u2212])?(?:\\?\$(?P<inner>[-\u2212])?)?"
    r"(?:\\[dt]?frac\{(?P<over>\d+)\}\{(?P<under>\d+)\}"
    rf"|(?<![\w^])(?<!\^[-{{])(?<!\^\{{-)(?<!\d\.)(?P<value>{_DIGITS})(?:/(?P<below>\d+))?)",
    re.ASCII,
)
_GOLD_NUMBER = re.compile(rf"[-+]?(?:{_DIGITS})")
TESTS = "tests:"  # begins the gold answer of a program: the name of its test set
MAX_ANSWER = 2000  # characters; longer "answers" are not answers
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


def plain(answer: str) -> str:
    r"""The answer without spacing, dollar signs, ``\text`` wrappers and a final full stop."""
    previous = None
    while previous != answer:
        previous, answer = answer, _WRAPPED.sub(r"\1", answer)
    answer = _DROPPED.sub("", answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    return answer.rstrip(".")


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


def option_letter(answer: str, boxed: bool = True) -> str | None:
    """The option an answer names: ``B``, ``(B)``, ``\\text{B}``; in running text, ``the answer is B``."""
    match = _LETTER.fullmatch(plain(answer))
    if match:
        return match[1]
    if boxed:
        return None
    said = _SAID.findall(answer)
    return said[-1] if said else None


def chosen_option(text: str) -> str | None:
    r"""The letter a response to a question with options ends on.

    The last ``\boxed`` if it names one (``\boxed{B}``, ``\boxed{(B) 5 m}``), else the last ``answer: (B)``, else the
    last ``option B``, else a last line that is a letter alone. None where there is none.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        led = _LED.match(_WRAPPED.sub(r"\1", boxed).strip())
        return option_letter(boxed) or (led[1] if led else None)
    tail = text.rstrip()[-TAIL:]
    for said in (_ANSWERED, _OPTION):
        if found := said.findall(tail):
            return str(found[-1])
    alone = _ALONE.fullmatch(tail.rpartition("\n")[2])
    return alone[1] if alone else None


def quick(gold: str, predicted: str, boxed: bool) -> bool | None:
    """Equal (True), different (False), or undecided without algebra (None)."""
    if max(len(gold), len(predicted)) > MAX_ANSWER:
        return None
    if boxed and plain(gold) and plain(gold) == plain(predicted):
        return True
    letter = option_letter(gold)
    if letter is not None:
        named = option_letter(predicted, boxed)
        return None if named is None else named == letter
    a, b = whole_number(gold), whole_number(predicted)
    return None if a is None or b is None else a == b
