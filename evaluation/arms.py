"""Arms as data: which model, which rules, which source of triggers. Adding an arm is adding a row to ``ARMS``.

Every arm answers the same problems with the same seeds, at the same sampling and cap; the report reads ``about``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neureasoner.data_builders.families import FAMILIES
from neureasoner.data_builders.grading.answers import option_letter
from neureasoner.data_builders.grading.options import listed_options
from neureasoner.errors import UserError
from neureasoner.traces import Problem, Trace

if TYPE_CHECKING:
    from neureasoner.inference.plan import Plan
    from neureasoner.inference.steered import SteeredModel

VANILLA, FULL, RANDOM, VOTE, NO_THINKING = "vanilla", "full", "random_trigger", "self_consistency", "no_thinking"
FAMILY_CLOSING, RANDOM_CLOSING = "family_closing", "random_closing"
SHARES = (0.25, 0.5, 0.75)  # budgets, as shares of vanilla's mean thinking: the points of a budget's curve


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    model     ``base`` (the vanilla model) or ``steered`` (the trained one)
    rules     rules of the plan to keep; ``all``, none, or names
    trigger   who pulls: ``probe`` (the chosen ones), ``paper`` (spectral only), ``random``, ``oracle``, ``rates`` (a
              coin at the rates of ``evaluation/closings.py``); or another control of the plan, ``flipped`` or
              ``random_direction`` (``inference/controls.py``)
    needs     arms measured first, because this one takes a number from them
    baseline  how it decodes, a name of ``inference.baselines``
    default   whether it runs without being asked for by name
    share     a budget's share of vanilla's mean thinking
    nothinking  the thinking is closed in the prompt; the prefill is counted all the same
    """

    name: str
    about: str
    model: str = "steered"
    rules: tuple[str, ...] = ()
    trigger: str = "probe"
    nothinking: bool = False
    vote: bool = False
    needs: tuple[str, ...] = ()
    baseline: str = ""
    default: bool = True
    share: float = 0.5

    @property
    def plain(self) -> bool:
        """Whether it is stock generation of the base model, which a server can do as well."""
        return self.model == "base" and not self.baseline


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(VANILLA, "the base model, nothing watched", model="base"),
        Arm("sft_only", "the model trained on triggers, nothing watched"),
        Arm("instance", "only the rule that closes the thinking", rules=("instance",)),
        Arm("intra", "only the rule that repairs a wrong step", rules=("intra",)),
        Arm("inter", "only the rule that leaves a circle", rules=("inter",)),
        Arm("full_paper", "all rules on the paper's spectral probes", rules=("all",), trigger="paper"),
        Arm(FULL, "all rules on the probes chosen on validation problems", rules=("all",)),
        Arm(RANDOM, "all rules pulled by a coin, at full's rate", rules=("all",), trigger="random", needs=(FULL,)),
        Arm(NO_THINKING, "the base model with the thinking closed in the prompt", model="base", nothinking=True),
        Arm(
            VOTE,
            "majority over as many no_thinking answers as cost full's mean tokens",
            model="base",
            nothinking=True,
            vote=True,
            needs=(FULL, NO_THINKING),
        ),
        Arm("oracle_trigger", "all rules pulled by the exact judge: the ceiling", rules=("all",), trigger="oracle"),
        *(
            Arm(f"oracle_{rule}", f"only the rule {rule}, pulled by the exact judge", rules=(rule,), trigger="oracle")
            for rule in ("intra", "inter", "instance")
        ),
        *(
            Arm(name, about, rules=("instance",), trigger="rates", needs=(FULL,))
            for name, about in (
                (FAMILY_CLOSING, "only the closing rule, pulled by a coin at full's rate in each family and step"),
                (RANDOM_CLOSING, "only the closing rule, pulled by a coin at full's rate at each step, any family"),
            )
        ),
        Arm("flipped", "all rules, their strengths with the other sign", rules=("all",), trigger="flipped"),
        Arm(
            "random_direction",
            "all rules, along random directions of equal norm",
            rules=("all",),
            trigger="random_direction",
        ),
        Arm(
            "no_thinking_share",
            "the base model with as many thinkings closed at once as full closes, drawn by a coin",
            model="base",
            baseline="no_thinking",
            needs=(FULL,),
        ),
        Arm(
            "no_thinking_budget",
            "no_thinking made to answer after half of vanilla's mean thinking",
            model="base",
            baseline="budget_forcing",
            needs=(VANILLA,),
            default=False,
        ),
        *(
            Arm(
                name if share == 0.5 else f"{name}_{share:.0%}".rstrip("%"),
                f"the base model {what} after {share:.0%} of vanilla's mean thinking",
                model="base",
                baseline=name,
                needs=(VANILLA,),
                default=False,
                share=share,
            )
            for name, what in (("budget_forcing", "made to answer"), ("thinking_budget", "made to end its thinking"))
            for share in SHARES
        ),
        *(
            Arm(name, about, model="base", baseline=name, needs=needs, default=False)
            for name, about, needs in (
                ("wait_penalty", "the base model without wait-like words", ()),
                ("think_or_not", "the base model's thinking closed once its answers agree", ()),
                ("alpha_one", "the base model made to think slowly, then fast (AlphaOne)", (VANILLA,)),
            )
        ),
    )
}

STEERED = ("flipped", "random_direction")
LACKS = {  # what a plan has to have for a control, in words
    "random": "forces a text on an alarm that a coin could pull",
    "oracle": "forces a text on an alarm that the judge could pull",
    "flipped": "has a sign to flip",
    "random_direction": "has a direction",
}

# Whom each arm is compared with, paired by problem, besides vanilla.
RIVALS = {
    FULL: (
        *(RANDOM, FAMILY_CLOSING, RANDOM_CLOSING, "random_direction"),
        *("sft_only", "full_paper", VOTE, "no_thinking_share"),
    ),
    **{f"oracle_{rule}": ("sft_only", rule) for rule in ("intra", "inter", "instance")},
    "oracle_trigger": (FULL,),
    "full_paper": (RANDOM,),
}


def choose(
    names: Sequence[str],
    rules: Iterable[str],
    has_paper: bool,
    plain: bool = False,
    exact: bool = True,
    votable: bool = True,
    controls: Collection[str] = tuple(LACKS),
) -> tuple[list[Arm], dict[str, str]]:
    """Arms to run, in an order in which needs come first, and why others are left out.

    ``plain``: the model is no steered checkpoint; ``exact``: the exact judge knows the problems; ``votable``: their
    answers can be voted over (programs cannot); ``controls``: ``controls_of`` the plan. No names means all that can run
    of the default ones. Raises UserError for an unknown arm, or a named one that cannot run (of a plan without any
    rules those that need some are left out).
    """
    rules, skipped, wanted = set(rules), {}, []
    for name in names:
        if name not in ARMS:
            raise UserError(f"unknown arm '{name}'; known: {', '.join(ARMS)}")

    def why_not(arm: Arm) -> str:
        missing = [r for r in arm.rules if r not in rules and r != "all"]
        if plain and any(ARMS[n].model != "base" for n in (arm.name, *arm.needs)):
            return "the model is no steered checkpoint (a folder that `neureasoner assemble` wrote)"
        if missing:
            return f"the plan has no rule {missing[0]} (its probe was not fitted)"
        if arm.rules and not rules:
            return "the plan has no rules"
        if arm.name == "no_thinking_share" and "instance" not in rules:
            return "the plan has no rule instance, so there is no share to draw at"
        if arm.trigger == "paper" and not has_paper:
            return "the checkpoint has no probes/paper"
        if arm.trigger in LACKS and arm.trigger not in controls:
            return f"no rule of the plan {LACKS[arm.trigger]}"
        if arm.trigger == "oracle" and not exact:
            return "the exact judge knows the generators' problems only"
        if arm.vote and not votable:
            return "programs have no majority"
        if arm.baseline == "think_or_not" and not votable:
            return "Think or Not has no recipe for programs"
        return ""

    # `choose` writes a plan without rules where none pays: what needs one is then left out, and the report says so.
    ruleless = not rules and not plain
    unasked = {a.name for a in ARMS.values() if not a.default or (a.trigger in STEERED and a.trigger not in controls)}
    for name in names or [n for n in ARMS if n not in unasked]:
        reason = why_not(ARMS[name])
        if reason and names and not (ruleless and ARMS[name].rules):
            again = "" if plain or ARMS[name].model == "base" else " or assemble again"
            raise UserError(f"arm '{name}' cannot run: {reason}; leave it out{again}")
        if reason:
            skipped[name] = reason
        else:
            wanted.append(name)
    if not names or ruleless:  # an arm falls with what it needs
        for name in [n for n in wanted if any(need in skipped for need in ARMS[n].needs)]:
            wanted.remove(name)
            skipped[name] = f"needs {', '.join(ARMS[name].needs)}"
    full_set = set(wanted) | {need for n in wanted for need in ARMS[n].needs}
    first = [a for a in ARMS.values() if a.name in full_set and not a.needs]
    return first + [a for a in ARMS.values() if a.name in full_set and a.needs], skipped


def controls_of(plan: Plan) -> set[str]:
    """Which controls of ``LACKS`` a plan can be put under."""
    signed = any(not r.forces and r.action.kind != "set" and r.strength.value for r in plan.rules)
    found = {"random", "oracle"} if _alarmed(plan) else set()
    return found | ({"flipped"} if signed else set()) | ({"random_direction"} if plan.direction_paths else set())


def votes(full_tokens: float, answer_tokens: float) -> int:
    """How many NoThinking answers cost about as much as one full answer (at least one)."""
    return max(1, round(full_tokens / max(answer_tokens, 1e-9)))


def replay(trace: Trace, plan: Plan, tokenizer: Any) -> dict[str, tuple[int, int]]:
    """(times a rule could have won, times it did) by rule, of ``occasions``."""
    return {name: (len(due), len(won)) for name, (due, won) in occasions(trace, plan, tokenizer).items()}


def occasions(trace: Trace, plan: Plan, tokenizer: Any) -> dict[str, tuple[list[int], list[int]]]:
    """After how many steps a rule could have won, and after how many it did, by rule: the controller's bookkeeping run
    over a finished trace. A rule could have won where it was due and no rule of higher priority won.
    """
    from neureasoner.inference.rows import RowState
    from neureasoner.steps import Separators, StepSegmenter
    from neureasoner.thinking import opens_thinking

    forced, order = plan.forced_ids(tokenizer), _alarmed(plan)
    won = {e["token"]: e["rule"] for e in trace.events if not e["suppressed"] and e["rule"] in order}
    due: dict[str, list[int]] = {name: [] for name in order}
    fired: dict[str, list[int]] = {name: [] for name in order}
    eos = {trace.response_ids[-1]} if trace.finished else set()
    opened = opens_thinking(trace.prompt_ids, tokenizer)
    row = RowState(0, StepSegmenter(Separators.of(tokenizer), opened, eos), tokenizer)
    for token in trace.response_ids:
        row.pop()
        row.push(token, eos)
        winner = won.get(len(row.tokens))
        for rule in map(plan.rule, order):
            if row.silent(rule) and winner != rule.name:
                continue
            if row.due(rule) and (winner is None or order.index(rule.name) <= order.index(winner)):
                due[rule.name].append(row.steps)
        if winner is not None:
            fired[winner].append(row.steps)
            row.fire(plan.rule(winner), forced[winner])
    return {name: (due[name], fired[name]) for name in order}


def measured_rates(traces: Iterable[Trace], plan: Plan, tokenizer: Any) -> dict[str, float]:
    """Per rule, interventions per step at which it was evaluated: the coin's bias in ``random_trigger``."""
    names = _alarmed(plan)
    due, fired = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for trace in traces:
        for name, (d, f) in replay(trace, plan, tokenizer).items():
            due[name] += d
            fired[name] += f
    return {name: min(1.0, fired[name] / due[name]) if due[name] else 0.0 for name in names}


def _alarmed(plan: Plan) -> list[str]:
    """Rules that force a text when an alarm says so: those whose trigger a coin or a judge can replace."""
    return [name for name in plan.priority if plan.rule(name).forces and plan.rule(name).evaluated]


def options_of(problems: Sequence[Problem]) -> str:
    """Such as ``ABCD`` where every problem asks for one of just these options; else nothing."""
    found = {
        listed_options(p.question) if p.family not in FAMILIES and option_letter(p.answer) else "" for p in problems
    }
    return found.pop() if len(found) == 1 else ""


def thinking_of(vanilla: Iterable[Trace]) -> float:
    """Mean thinking tokens of vanilla's run: N_think of core.md §5.2. Raises UserError where nothing was thought."""
    lengths = [int(t.meta.get("thinking_tokens", 0)) for t in vanilla]
    mean = sum(lengths) / max(len(lengths), 1)
    if mean < 2:
        raise UserError(
            f"vanilla's responses have {mean:.1f} tokens of thinking on average, so none to shorten; leave out "
            + ", ".join(a.name for a in ARMS.values() if a.baseline and VANILLA in a.needs and a.share == 0.5)
        )
    return mean


def closed_share(full: Iterable[Trace]) -> float:
    """Share of full's responses in which the instance rule closed the thinking."""
    closed = [any(e["rule"] == "instance" and not e["suppressed"] for e in t.events) for t in full]
    return sum(closed) / max(len(closed), 1)


def baseline_settings(arm: Arm, problems: Sequence[Problem], thinking: float, share: float = 0.0) -> dict[str, Any]:
    """What a baseline is run with here (docs/evaluation.md). ``thinking``: of ``thinking_of``, where it needs vanilla;
    ``share``: of ``closed_share``, where it needs full.

    The rule: AlphaOne's N_think is ``thinking``; a budget is the arm's share of it, rounded.
    """
    if arm.baseline == "no_thinking":
        return {"share": share}
    if arm.baseline == "think_or_not":
        return {"options": options_of(problems)}
    key = {"alpha_one": "n_think", "thinking_budget": "tokens", "budget_forcing": "budget"}.get(arm.baseline)
    if key is None:
        return {}
    settings: dict[str, Any] = {key: thinking if key == "n_think" else max(1, round(arm.share * thinking))}
    return settings | ({"no_thinking": True} if arm.name == "no_thinking_budget" else {})


def as_baseline(base: SteeredModel, arm: Arm, settings: Mapping[str, Any]) -> SteeredModel:
    """The base model decoded as this arm's baseline. Never by ``with_plan``, which makes a plain SteeredModel."""
    from neureasoner.data_builders.grading.grade import same_answer
    from neureasoner.inference.baselines import baseline

    more = {"same": same_answer} if arm.baseline == "think_or_not" else {}
    return baseline(arm.baseline, base.model, base.tokenizer, **settings, **more)


def with_rules(steered: SteeredModel, arm: Arm, rates: dict[str, float] | None = None) -> SteeredModel:
    """The checkpoint under this arm's plan. ``rates``: the coins of ``random_trigger``."""
    from neureasoner.inference.controls import flipped, random_direction
    from neureasoner.inference.plan import Plan

    if not arm.rules:
        return steered.with_plan(Plan("none", folder=steered.plan.folder))
    if arm.trigger == "paper":
        return steered.paper()
    if arm.trigger == "flipped":
        return steered.with_plan(flipped(steered.plan))
    if arm.trigger == "random_direction":
        return steered.with_plan(*random_direction(steered.plan, steered.directions, seed=0))
    plan = steered.plan if arm.rules == ("all",) else steered.plan.select(arm.rules)
    if arm.trigger == "random":
        plan = plan.replace_triggers({name: {"random": (rates or {})[name]} for name in _alarmed(plan)})
    elif arm.trigger == "rates":
        plan = plan.replace_triggers({name: {"oracle": name} for name in arm.rules})
    elif arm.trigger == "oracle":
        # The judge may see the answer at any step, so the closing rule is not held to its probe's one decision.
        plan = plan.replace_triggers({name: {"oracle": name, "at_step": None} for name in _alarmed(plan)})
    return steered.with_plan(plan)
