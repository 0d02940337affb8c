r"""Which option a response to a question with options ends on. What is ambiguous is never guessed.

A letter counts where it is boxed, or where a sentence states it ("the answer is B", "option B is correct", "so, option
B"). Before sentences are read, brackets, emphasis, dollar signs and ``\text`` around a lone letter are all made (B).
"""

from __future__ import annotations

import re

from neureasoner.data_builders.grading.answers import MAX_ANSWER, TAIL, last_boxed, unwrapped

LETTERS = "ABCDEFGHIJ"

_SHOWN = re.compile(r"^\(([A-J])\)\s", re.MULTILINE)  # an option, as the benchmarks' templates write it
_SPACE = re.compile(r"\\[,;:! ]|\\q?quad\b|~")
_MARKED = re.compile(r"""(?:\\[(\[]|[*_`$"(\[])+\s*([A-J])[.:]?\s*(?:\\[)\]]|[*_`$")\]])+""")
_MARKS = re.compile(r"\\[()\[\]]|[*_`$]")

# A letter: not in a word or a formula (A's, C-H, B = 5), nor asked for. A and I before a word are an article and a
# pronoun, unless that word goes on after an answer.
_ON = r"(?:and|as|because|but|for|is|must|not|or|seems|since|would)\b"
_ONE = rf"(?:(?<!\w)\([A-J]\)|(?<![\w(\\^])(?![AI][ \t]+(?!{_ON})[A-Za-z])[A-J](?![\w'’^-]))(?!\s*[=?])"
_OPTION = r"(?i:option|choice|letter)"
_VERB = r"\s+(?:is|was|would|has|can|cannot)\b"  # after a letter: here a new sentence begins
# More letters beside it leave the choice open ("A or B", "A, B"); "B, and A is wrong" does not.
_SAID = (
    rf"(?P<said>{_ONE}(?:\s*(?:[/&]|,?\s*\bor\b)\s*(?:{_OPTION}\s+)?{_ONE}"
    rf"|\s*(?:,|,?\s*\band\b)\s*(?:{_OPTION}\s+)?{_ONE}(?!{_VERB}))*+)"
)
_NOT = r"(?:not|never|cannot|neither|nor|\w+n['’]t)\b"
_THUS = r"(?i:then|thus|therefore|indeed|\w+ly)"
# "The answer I choose is (B)", "the correct option would be B", "Answer: B". Not: "the answer is not B".
_ANSWER = re.compile(
    rf"\b(?i:answer|option|choice)\b(?:,?\s+(?![A-HJ]\b|{_NOT}|(?:choices|options)\b)[\w'’]+){{0,6}}?,?"
    rf"(?:\s+(?i:is|be)\b\s*:?|\s*[:=])\s*(?:(?:the|answer|{_OPTION}|{_THUS})\s+)*{_SAID}(?!{_VERB})"
)
# "Option B is correct", "so B must be the best choice". Not: "statement B is correct", "B is correct only if …".
_CORRECT = re.compile(
    rf"(?:^|[.,;:!\n]\s*|\b(?i:so|thus|therefore|hence|that|answer|{_OPTION})\s+)(?P<said>{_ONE})\s+"
    rf"(?:is|must be|would be|has to be|seems)(?:\s+(?:the|most|{_THUS}))*\s+(?:correct|right|best|answer)\b"
    r"(?!\s+(?:only|if|when)\b)"
)
# "I choose option B", "so, option B.", "which matches option B". Not: "so option A fails".
_CHOSEN = re.compile(
    r"\b(?i:choose|chose|pick|select|go with|match|matches|corresponds? to|(?:it|this|that|which) is|it['’]s"
    rf"|so|thus|therefore|hence),?\s+(?:the\s+)?{_OPTION}\s+{_SAID}"
    r"(?![ \t]*:|[ \t]+(?!(?:as|because|since)\b)\w)"
)
# "if the answer is", "it is not true that the answer is"
_DENIED = re.compile(rf"\b(?i:if|suppose|unless|whether|{_NOT})(?:\s+[\w'’]+){{0,3}}\s*\Z")
_ALONE = re.compile(rf"\s*(?:{_OPTION}\s+)?\(?([A-J])\)?[.:]?\s*")

# In a box. Its letters: alone, before the text of their options, or in a list.
_LEAD = re.compile(rf"\A(?:the\s+)?(?:correct\s+|final\s+)?(?i:answer|{_OPTION})(?:\s+is)?\s*:?\s+", re.IGNORECASE)
_ANY_CASE = re.compile(r"\(?([A-Ja-j])\)?[.:]?")
_JOIN = r"(?:[,;/&]|\band\b|\bor\b)"
_BOXED = re.compile(rf"(?:^|{_JOIN}\s*)\(?([A-J])(?:\)|[.:](?=\s|$)|(?=\s+\()|(?=\s*(?:$|{_JOIN})))")


def listed_options(question: str) -> str:
    """The letters of the options that a question lists, such as ``ABCD``; nothing where it lists none."""
    shown = "".join(_SHOWN.findall(question))
    last = shown[max(shown.rfind("A"), 0) :]  # the stem may have a list of its own
    return last if len(last) > 1 and LETTERS.startswith(last) else ""


def shown_options(question: str) -> str:
    """``listed_options``; all of A to J where a question lists none."""
    return listed_options(question) or LETTERS


def boxed_letters(content: str) -> str:
    r"""The letters that the content of a box names: ``B`` for ``\text{Option B}``, ``AB`` for ``A or B``, else none.

    A small letter counts if it is all that is boxed.
    """
    if len(content) > MAX_ANSWER:
        return ""
    text = _LEAD.sub("", _MARKS.sub("", _SPACE.sub(" ", unwrapped(content))).strip(), count=1)
    alone = _ANY_CASE.fullmatch(text)
    return alone[1].upper() if alone else "".join(dict.fromkeys(_BOXED.findall(text)))


def stated_option(text: str, letters: str = LETTERS) -> str | None:
    """The one of ``letters`` that the end of a text states. None where it states none, or leaves open which.

    The last "the answer is B" counts; else all of "option B is correct", else all of "I choose option B", must agree;
    else a last line may be a letter alone. Linear in the text.
    """
    tail = _MARKS.sub("", _MARKED.sub(r"(\1)", unwrapped(text.rstrip()[-TAIL:])))
    for statement in (_ANSWER, _CORRECT, _CHOSEN):
        said = [set(re.findall("[A-J]", m["said"])) for m in statement.finditer(tail) if not _denied(tail, m)]
        if said := [named for named in said if named & set(letters)]:
            named = said[-1] if statement is _ANSWER else set().union(*said)
            return named.pop() if len(named) == 1 else None
    alone = _ALONE.fullmatch(tail.rpartition("\n")[2])
    return alone[1] if alone and alone[1] in letters else None


def _denied(text: str, match: re.Match[str]) -> bool:
    return _DENIED.search(text, 0, match.start()) is not None


def chosen_option(text: str, letters: str = LETTERS) -> str | None:
    r"""The one of ``letters`` that a response ends on: in its last ``\boxed``, else as ``stated_option`` finds it.

    A box that names several letters is no choice. One that names none (``The answer is (B): \boxed{5 m}``) does not
    undo what the text states: the question is which option was chosen, not in which form, and nobody gains by it, for
    what is stated must be clear.
    """
    boxed = last_boxed(text)
    named = boxed_letters(boxed) if boxed is not None else ""
    if len(named) > 1:
        return None
    return named if named and named in letters else stated_option(text, letters)
