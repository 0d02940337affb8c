"""Budget forcing (core.md §5.9): at a token budget the response is made to answer."""

from __future__ import annotations

from typing import Any

from neureasoner.errors import UserError
from neureasoner.inference.baselines.decoder import Decoder, DecoderWatch
from neureasoner.inference.baselines.plans import CLOSE, start_rule
from neureasoner.inference.plan import Action, Plan, Rule, Trigger

STUB = "Final Answer: \\boxed{"


class BudgetWatch(DecoderWatch):
    """Once in a row, at the first token from the budget on: the stub, and before it the end of an open thinking."""

    def _act(self) -> None:
        """Force the stub where the budget is used up."""
        thinking, answering = self.decoder.plan.rule("close"), self.decoder.plan.rule("stub")
        for row in self.rows:
            if row.done or row.queue or len(row.tokens) < self.decoder.budget:
                continue
            if not row.fired[thinking.name] and not row.fired[answering.name]:
                self.force(row, thinking if row.thinking else answering)


class BudgetForcing(Decoder):
    """See ``budget_forcing``."""

    kind = BudgetWatch

    def __init__(self, model: Any, tokenizer: Any, budget: int, stub: str, no_thinking: bool):
        self.budget = budget
        when = Trigger(always=True, immediate=True, min_tokens=budget)
        rules = [Rule("close", when, Action(force=CLOSE + stub)), Rule("stub", when, Action(force="\n\n" + stub))]
        name = "no_thinking_budget" if no_thinking else "budget_forcing"
        super().__init__(model, tokenizer, Plan(name, (*([start_rule()] if no_thinking else []), *rules)))


def budget_forcing(
    model: Any, tokenizer: Any, budget: int, stub: str = STUB, no_thinking: bool = False
) -> BudgetForcing:
    """After ``budget`` response tokens (forced ones count) force ``stub``, closing an open thinking first.

    ``no_thinking``: NoThinking with budget forcing, its prefill forced before the first token. What ``max_new_tokens``
    leaves above the budget is for the stub and the answer.
    """
    if budget < 1:
        raise UserError(f"budget_forcing: budget must be at least 1, got {budget}")
    return BudgetForcing(model, tokenizer, budget, stub, no_thinking)
