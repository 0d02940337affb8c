"""A model with its plan, probes, directions and gates as one object, and as one folder: the steered checkpoint.

The folder is a plain model folder (``AutoModelForCausalLM.from_pretrained`` loads it) with ``plan.yaml``, what the plan
names (``probes/<level>/``, ``directions/<name>/``, ``gates/<name>/``) and ``neureasoner.json`` beside the weights.

Usage::

    steered = SteeredModel.from_pretrained("runs/quick/steered")
    [answer] = steered.generate(["What is 17 + 25 * 3?"], seed=1)
    print(answer.text, answer.events)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json
from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference.assemble import CARD, assemble
from neureasoner.inference.controller import Controller, Oracle
from neureasoner.inference.decode import Generation, OnText, generate_batch
from neureasoner.inference.plan import PLAN_FILE, Plan
from neureasoner.prompts import Prompt, as_prompts, check_ids, encode_prompt
from neureasoner.sampling import Sampling, check_whole, eos_ids
from neureasoner.traces import Problem

__all__ = ["Generation", "Prompt", "SteeredModel", "assemble", "encode_prompt", "generate_batch"]

# Arguments of Transformers' ``generate`` that people try first, and what to say instead.
INSTEAD = {
    "do_sample": "temperature=0 is greedy, anything above samples",
    "num_beams": "beam search cannot be watched",
    "input_ids": "give them as the prompts",
    "inputs": "give them as the prompts",
    "attention_mask": "give the tokenizer's whole output as the prompts",
    "max_length": "use max_new_tokens",
    "max_tokens": "use max_new_tokens",
    "streamer": "use on_text",
    "n": "use num_return_sequences",
    "generation_config": "give its fields one by one",
}


def load_probes(plan: Plan, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The probes a plan names, by the name it uses. Raises UserError naming a missing file."""
    from neureasoner.probes.detectors.probe import Probe

    probes = dict(known or {})
    for name in plan.probe_paths:
        if name not in probes:
            folder = plan.folder / name
            for file in ("probe.json", "probe.safetensors"):
                if not (folder / file).is_file():
                    raise UserError(f"plan {plan.name} names probe {name}, but {folder / file} does not exist")
            probes[name] = Probe.load(folder)
    return probes


def load_directions(plan: Plan, known: Mapping[str, Direction] | None = None) -> dict[str, Direction]:
    """The directions a plan names, by the name it uses. Raises UserError naming the rule's folder."""
    return _loaded(plan, "direction", plan.direction_paths, Direction.load, known)


def load_gates(plan: Plan, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The failure gates a plan names, by the name it uses. Raises UserError naming the rule's folder."""
    from neureasoner.probes.detectors.gate import FailureGate

    return _loaded(plan, "gate", plan.gate_paths, FailureGate.load, known)


def _loaded(
    plan: Plan, what: str, names: Sequence[str], load: Callable[[Path], Any], known: Mapping[str, Any] | None
) -> dict[str, Any]:
    found = dict(known or {})
    for name in names:
        if name not in found:
            try:
                found[name] = load(plan.folder / name)
            except UserError as e:
                raise UserError(f"plan {plan.name} names {what} {name}: {e}") from None
    return found


def check_reachable(plan: Plan, probes: Mapping[str, Any]) -> None:
    """Raises UserError for a threshold that no probability exceeds (a decision rule's statistic may), but infinity: who
    writes that wants the rule watched and nothing more."""
    for rule in plan.rules:
        t = rule.trigger
        if t.probe is None or probes[t.probe].rule is not None:
            continue
        threshold = probes[t.probe].threshold if t.threshold is None else t.threshold
        if 1 <= threshold < math.inf:
            own = "its own" if t.threshold is None else "the"
            raise UserError(
                f"plan {plan.name}, rule {rule.name} can never fire: the score of {t.probe} is a probability, never "
                f"above {own} threshold {threshold}; set a lower `threshold` in the trigger"
            )


def check_tokenizer(folder: Path, card: Mapping[str, Any], tokenizer: Any) -> None:
    """Raises UserError for a tokenizer that is not the one the checkpoint was assembled with: the ids of its texts
    would mean other tokens, and nothing else would notice."""
    from neureasoner.models import tokenizer_fingerprint

    expected = card.get("tokenizer_fingerprint")
    if expected and expected != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{folder}: its tokenizer is not the one that it was assembled with (other ids for the same tokens); put "
            "that back, or run `neureasoner assemble` again from the model it belongs to"
        )


def unknown_oracles(plan: Plan) -> dict[str, Oracle]:
    """Oracles are only known at generation; until then any will do."""
    return {r.trigger.oracle: (lambda row: False) for r in plan.rules if r.trigger.oracle}


class SteeredModel:
    """A stock model and tokenizer, a plan, and the probes, directions and gates the plan names.

    Nothing of a generation is kept here: two calls share no state. ``accept`` lists fingerprints of other models whose
    artifacts are welcome (the base the checkpoint was trained from). What is given in ``probes``, ``directions`` or
    ``gates`` is taken instead of the folder of that name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan,
        probes: Mapping[str, Any] | None = None,
        accept: Sequence[str] = (),
        directions: Mapping[str, Direction] | None = None,
        gates: Mapping[str, Any] | None = None,
    ):
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.accept = list(accept)
        self.probes = load_probes(plan, probes)
        check_reachable(plan, self.probes)
        self.directions, self.gates = load_directions(plan, directions), load_gates(plan, gates)
        for origin in (*self.probes.values(), *self.gates.values()):  # once: hashing a large model takes a while
            if origin.model_fingerprint not in self.accept:
                origin.check(model)
                self.accept.append(origin.model_fingerprint)
        for direction in self.directions.values():
            if direction.fingerprint and direction.fingerprint not in self.accept:
                direction.check(model)
                self.accept.append(direction.fingerprint)
        self.card: dict[str, Any] = {}
        self.controller(unknown_oracles(plan))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        plan: Plan | str | Path | None = None,
        device: Any = None,
        dtype: Any = None,
        device_map: Any = None,
    ) -> SteeredModel:
        """Load a steered checkpoint; ``plan`` (a Plan or a file) replaces its own, the others as in ``models.load``.

        Raises UserError naming a missing file, a missing trigger token, or a probe of another model.
        """
        from neureasoner.models import known_as, load, load_tokenizer, resolve

        folder = Path(resolve(str(folder)))
        if plan is None:
            if not (folder / PLAN_FILE).is_file():
                raise UserError(f"{folder} holds no {PLAN_FILE}, so it is not a steered checkpoint; run assemble first")
            plan = folder
        if not isinstance(plan, Plan):
            plan = Plan.load(plan)
        # small files first: a model that takes minutes to load is not loaded for a plan that lacks one
        probes, directions, gates = load_probes(plan), load_directions(plan), load_gates(plan)
        check_reachable(plan, probes)
        card = read_json(folder / CARD) if (folder / CARD).is_file() else {}
        check_tokenizer(folder, card, load_tokenizer(str(folder)))
        model, tokenizer = load(str(folder), device=device, dtype=dtype, device_map=device_map)
        accept = known_as(card["base_fingerprint"]) if card.get("base_fingerprint") else ()
        steered = cls(model, tokenizer, plan, probes, accept, directions, gates)
        steered.card = card
        return steered

    def with_plan(self, plan: Plan, directions: Mapping[str, Direction] | None = None) -> SteeredModel:
        """The same model under another plan; what is already loaded from the same folder is shared.

        ``directions`` are taken instead of the folders of those names (the random control).
        """
        same = plan.folder == self.plan.folder
        given = {**(self.directions if same else {}), **(directions or {})}
        probes, gates = (self.probes, self.gates) if same else (None, None)
        other = SteeredModel(self.model, self.tokenizer, plan, probes, self.accept, given, gates)
        other.card = self.card
        return other

    def paper(self) -> SteeredModel:
        """The same rules on the paper's spectral probes (``probes/paper/<level>``); rules without one are dropped."""
        changes: dict[str, dict[str, Any]] = {}
        for rule in self.plan.rules:
            if rule.trigger.probe is None:
                continue
            name = f"probes/paper/{Path(rule.trigger.probe).name}"
            if (self.plan.folder / name / "probe.json").is_file():
                changes[rule.name] = {"probe": name}
        plan = self.plan.select(changes).replace_triggers(changes)
        probes = load_probes(plan)
        return self.with_plan(plan.fit_windows(probes))

    def controller(self, oracles: Mapping[str, Oracle] | None = None, record: Sequence[str] = ()) -> Controller:
        """A controller for this plan. Raises UserError for what cannot run."""
        return Controller(
            self.model,
            self.tokenizer,
            self.plan,
            self.probes,
            oracles=oracles,
            record=record,
            accept=self.accept,
            directions=self.directions,
            gates=self.gates,
        )

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.6,
        top_p: float = 0.95,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        num_return_sequences: int = 1,
        batch_size: int = 32,
        nothinking: bool = False,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        oracles: Mapping[str, Oracle] | None = None,
        record: Sequence[str] = (),
        on_text: OnText | None = None,
        progress: Callable[[int, int], None] | None = None,
        strengths: Mapping[str, Sequence[float]] | None = None,
        **unknown: Any,
    ) -> list[Generation]:
        """Responses in the order of the prompts, ``num_return_sequences`` of each (neighbours in the list).

        prompts   one or a list of: a Problem, a question, chat messages, token ids; a tensor, an array, or what a
                  tokenizer returns, too (``neureasoner.prompts.as_prompts``)
        sampling  ``max_new_tokens`` (forced ones counted), ``temperature`` (0 is greedy), ``top_p``, ``top_k``,
                  ``min_p``; nothing of the model folder's generation settings but its end tokens
        seed      batch ``b`` draws with ``seed + 1_000_003 * b``; batches are cut in the order given, so the result
                  depends on the seed and the batches alone
        nothinking, system, chat_template_kwargs  see ``neureasoner.prompts.encode_prompt``
        oracles   get the row's state, whose ``index`` is the response's place here
        on_text   ``on_text(text, forced)`` streams, and takes one row at a time
        progress  ``progress(done, total)`` after every batch
        strengths a factor for each prompt, by the names of the rules of strength ``per_row``

        A plan without rules runs without hooks. Threads and callbacks may ask the same model meanwhile. Raises
        UserError for what cannot run, before the first token: a rule that waits for more than there can be tokens is
        such a thing, an argument that is not known another.
        """
        for name in unknown:
            hint = f"; {INSTEAD[name]}" if name in INSTEAD else ""
            raise UserError(f"generate takes no '{name}'{hint}")
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, min_p)
        check_whole("batch_size", batch_size, 1)
        check_whole("num_return_sequences", num_return_sequences, 1)
        check_whole("seed", seed)
        for rule in self.plan.rules:
            t = rule.trigger
            if rule.evaluated and max(t.min_steps, t.at_step or 0, t.min_tokens, t.every or 0) >= max_new_tokens:
                raise UserError(
                    f"plan {self.plan.name}, rule {rule.name} can never fire: it waits for more steps or tokens than "
                    f"max_new_tokens ({max_new_tokens}) leaves room for"
                )
        pad, n = self.tokenizer.pad_token_id, num_return_sequences
        given = as_prompts(prompts, None if pad in eos_ids(self.model, self.tokenizer) else pad)
        size = 1 if on_text is not None else batch_size
        watched = bool(self.plan.rules) or bool(record) or bool(strengths)
        controller = self.controller(oracles, record) if watched else None
        if controller is not None:
            controller.steering.check_strengths(strengths, len(given))
        strengths = {name: [x for x in values for _ in range(n)] for name, values in (strengths or {}).items()}
        encoded = [encode_prompt(self.tokenizer, p, nothinking, system, chat_template_kwargs) for p in given]
        check_ids(encoded, int(self.model.get_input_embeddings().num_embeddings))
        jobs = [i for i in range(len(given)) for _ in range(n)]
        done: list[Generation] = []
        for b, start in enumerate(range(0, len(jobs), size)):
            places = range(start, min(start + size, len(jobs)))
            part = [jobs[k] for k in places]
            done += generate_batch(
                self.model,
                self.tokenizer,
                [encoded[i] for i in part],
                **asdict(sampling),
                seed=int(seed) + 1_000_003 * b,
                controller=controller,
                controller_seed=int(seed),
                indices=list(places),
                problems=[p if isinstance(p := given[i], Problem) else None for i in part],
                on_text=on_text,
                strengths={name: [values[k] for k in places] for name, values in strengths.items()},
            )
            if progress is not None:
                progress(len(done), len(jobs))
        return done
