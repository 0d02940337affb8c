"""A model of paper: it answers the four prompts mechanically, from what stands in them and nothing else.

It lets a whole job run over real traces, through real HTTP, with answers that pass or fail the real checks. What it
says means nothing: a judge that quotes some sentence of every second trace, a rewriter that miscounts by one. Every
eleventh answer breaks a rule on purpose (a quote that stands nowhere, a trigger too many, a torn end) until told so.
"""

from __future__ import annotations

import hashlib
import json
import re

BREAKS = 11


def _section(said: str, name: str) -> str | None:
    found = re.search(rf"<{name}>\n(.*?)\n</{name}>", said, re.DOTALL)
    return found[1] if found else None


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8], 16)


def reply(messages: list[dict[str, str]]) -> str | None:
    """The answer to one of our prompts; None for any other question."""
    system, said = messages[0]["content"], messages[1]["content"]
    breaks = len(messages) == 2 and _number(said) % BREAKS == 0
    if (trace := _section(said, "REASONING_TRACE")) is not None:
        return _judge(system, trace, breaks)
    if (reference := _section(said, "REFERENCE_REASONING")) is not None:
        return _rewrite(system, said, reference, breaks)
    return None


def _judge(system: str, trace: str, breaks: bool) -> str:
    parts = [p.strip() for p in re.split(r"\[Paragraph \d+\]\n", trace)[1:]]
    n = _number(trace)
    if "is_stagnant" in system:
        repeats = len(parts) > 8 and n % 3 == 0
        answer = {
            "is_stagnant": repeats,
            "loop_detected_at": f"Paragraph {len(parts) + 4 if breaks else 3}" if repeats else "none",
            "loop_theme": "bounds_restatement" if repeats else "none",
            "severity": "medium" if repeats else "none",
            "explanation": "It says what it said." if repeats else "It moves on.",
        }
    else:
        long = [p for p in parts if len(p) > 40 and p != "(left out)"]
        wrong = bool(long) and n % 2 == 0
        quote = re.split(r"(?<=[.!?])\s", long[n % len(long)])[0] if wrong else None
        answer = {
            "has_error": wrong,
            "first_error_step": "These words stand nowhere in it 4711." if wrong and breaks else quote,
            "error_type": "calculation" if wrong else "none",
            "explanation": "It does not hold." if wrong else "Every step is valid.",
        }
    text = json.dumps(answer)
    return text[: len(text) // 2] if breaks and n % 2 else text


def _rewrite(system: str, said: str, reference: str, breaks: bool) -> str:
    parts = [p for p in re.split(r"\n\s*\n", reference) if p.strip()]
    n = _number(said)
    keep = min(2 + n % 3, len(parts) - 2)
    rest = parts[keep:]
    if "FAILURE_INTER" in system:
        length = int(re.search(r"loop_length_paragraphs\W+(\d)", said)[1])  # type: ignore[index]
        words = " ".join(parts[keep - 1].split()[:12])
        failure = [
            f"Let me put it in other words once more ({'again, ' * i}as before): {words}." for i in range(length)
        ]
        block = (
            "<INTER>\n[FAILURE_INTER] I circle between near-equal checks. I sum up, then I change the route.\n"
            f"- **past attempts summary:** I said {length} times what I knew; no new fact came of it.\n"
            "- **problem-grounded analysis:** Saying it again cannot decide the question; a computation can.\n\n"
            "I take another way and start with the next computation."
        )
    else:
        value = int((re.findall(r"\d{1,6}", parts[keep]) or ["7"])[-1])
        failure = [f"So the next value here must be {value} + 1 = {value + 2}."]
        block = (
            "<INTRA>\n[FAILURE_INTRA] There is an error just before this. I locate it, say why, and fix it.\n"
            f'- **error span**: "{value} + 1 = {value + 2}"\n'
            f"- **analysis**: {value} + 1 is {value + 1}, so the step does not hold."
        )
    if breaks:
        rest = [*rest[:-1], "<INTRA> and <INTER>", rest[-1]]
    return "\n\n".join([*parts[:keep], *failure, block, *rest])
