"""The closing rule's controls: after which steps full closes a thinking, and coins that close as many there.

The rate of a step is a hazard: of full's responses in which the rule could have closed the thinking after that many
steps, the share in which it did. A coin at the rates of a family closes as often and as early as full does, and knows
nothing of the question but its family: what a probe that reads the family alone would do. At the rates of all families
together it does not know that either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from neureasoner.evaluation.arms import closed_share, occasions
from neureasoner.traces import Trace

if TYPE_CHECKING:
    from neureasoner.inference.plan import Plan
    from neureasoner.inference.rows import RowState
    from neureasoner.inference.rules import Rule

CLOSING, ANY = "instance", "*"
Rates = Mapping[str, Mapping[str, float]]  # family (or ANY) -> steps closed, as text for JSON -> rate


def closing_rates(traces: Iterable[Trace], plan: Plan, tokenizer: Any) -> dict[str, Any]:
    """``by_family`` and ``pooled`` rates of full's traces, and the ``share`` of responses that were closed."""
    due, won = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    rows: dict[str, list[Trace]] = {}
    for trace in traces:
        could, did = occasions(trace, plan, tokenizer)[CLOSING]
        for family in (trace.problem.family, ANY):
            rows.setdefault(family, []).append(trace)
            due.update((family, step) for step in could)
            won.update((family, step) for step in did)
    rates: dict[str, dict[str, float]] = {family: {} for family in sorted(rows)}
    for family, step in sorted(won):
        rates[family][str(step)] = won[family, step] / due[family, step]
    return {
        "by_family": {family: found for family, found in rates.items() if family != ANY},
        "pooled": {ANY: rates.get(ANY, {})},
        "share": {family: closed_share(rows[family]) for family in sorted(rows)},
    }


def coins(rates: Rates, rule: Rule) -> dict[str, Callable[[RowState], bool]]:
    """The oracle that pulls ``rule`` at these rates: of the row's family, or of ``ANY``."""

    def closes(row: RowState) -> bool:
        if row.silent(rule):
            return False
        rate = rates.get(row.problem.family, rates.get(ANY, {})).get(str(row.steps), 0.0)
        return row.coin(rule) < rate

    return {rule.name: closes}
