"""lm-evaluation-harness runs its tasks on a steered model, unchanged. Needs ``pip install 'neureasoner[harness]'``.

Usage::

    lm = AdapterLM("runs/full/steered", max_gen_toks=2048)
    lm_eval.simple_evaluate(model=lm, tasks=["gsm8k"], apply_chat_template=True)

or, with every option of the harness, ``python -m neureasoner.evaluation.adapter_lm run --model neureasoner
--model_args pretrained=runs/full/steered --tasks gsm8k``. Text is generated under the plan. Log-likelihoods are those
of the plain model: no token is chosen there, so there is nothing to intervene in; the results' ``config`` says so. A
response's thinking is cut off before the harness sees it, and stop texts count after the thinking only: a blank line
does not end a thought.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from neureasoner.errors import UserError
from neureasoner.inference.steered import SteeredModel
from neureasoner.models import input_device
from neureasoner.sampling import Sampling, eos_ids, pad_id
from neureasoner.thinking import CLOSED, OPEN, state_of, thinking_state
from neureasoner.traces import THINK_CLOSE

MISSING = ""
try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as e:  # said when somebody makes an AdapterLM
    MISSING = f"lm-evaluation-harness is not installed whole ({e}); run `pip install 'neureasoner[harness]'`"
    TemplateLM, register_model = object, lambda name: lambda cls: cls  # type: ignore[assignment,misc]

log = logging.getLogger(__name__)


@register_model("neureasoner")
class AdapterLM(TemplateLM):
    """A ``SteeredModel`` (or the folder of one) as a model of lm-evaluation-harness.

    ``max_gen_toks`` holds where a task names no cap. Sampling is the task's; a task that names none is greedy.
    ``steered`` False runs the same weights without their plan. ``counts`` sums what generating cost: responses, tokens
    (forced ones among them), interventions, responses cut off at the cap.
    """

    def __init__(
        self,
        pretrained: str | Path | SteeredModel,
        batch_size: int | str = 8,
        max_gen_toks: int = 1024,
        seed: int = 0,
        device: str | None = None,
        steered: bool = True,
        max_batch_size: int | None = None,
    ):
        if MISSING:
            raise UserError(MISSING)
        super().__init__()
        model = pretrained
        if not isinstance(model, SteeredModel):
            model = SteeredModel.from_pretrained(model, device=_here(device))
        self.model = model if steered else model.with_plan(model.plan.select([]))
        self.tokenizer = model.tokenizer
        self.size = max_batch_size or 8 if batch_size in (None, "", "auto") else int(batch_size)
        self.max_gen_toks, self.seed = int(max_gen_toks), int(seed)
        self.counts = {"responses": 0, "tokens": 0, "forced": 0, "interventions": 0, "cut_off": 0}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or the one that pads where none does."""
        return next(iter(eos_ids(self.model.model, self.tokenizer)), pad_id(self.tokenizer))

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return int(getattr(self.model.model.config, "max_position_embeddings", 0) or 2048)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. A chat prompt brings its own special tokens."""
        begin = self.tokenizer.bos_token
        special = add_special_tokens if add_special_tokens is not None else not (begin and string.startswith(begin))
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Chat messages as text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Responses under the plan, cut at the task's stop texts. Requests of like settings run together."""
        from neureasoner.progress import Progress

        settings = [_settings(r.args[1], self.max_gen_toks) for r in requests]
        done: dict[int, str] = {}
        with Progress(disable=disable_tqdm) as bar:
            task = bar.add_task("generating", total=len(requests))
            order = sorted(range(len(requests)), key=lambda i: astuple(settings[i][1]))
            for sampling, group in groupby(order, lambda i: settings[i][1]):
                places = list(group)
                prompts = [self._prompt(requests[i].args[0], sampling.max_new_tokens) for i in places]
                told = partial(_tell, bar, task, len(done))
                generations = self.model.generate(
                    prompts, seed=self.seed, batch_size=self.size, progress=told, **asdict(sampling)
                )
                for i, generation in zip(places, generations, strict=True):
                    self._count(generation)
                    done[i] = self._answer(generation, settings[i][0])
                    self.cache_hook.add_partial("generate_until", requests[i].args, done[i])
        return [done[i] for i in range(len(requests))]

    def _prompt(self, text: str, max_new_tokens: int) -> list[int]:
        ids = self.tok_encode(text) or [self.prefix_token_id]
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks {max_new_tokens} leaves no room for a prompt: the model has {self.max_length} positions"
            )
        if len(ids) > room:
            log.warning("a prompt of %d tokens is cut on the left to %d", len(ids), room)
        return ids[-room:]

    def _count(self, generation: Any) -> None:
        for name, more in {
            "responses": 1,
            "tokens": len(generation.response_ids),
            "forced": sum(generation.forced),
            "interventions": generation.triggers,
            "cut_off": not generation.finished,
        }.items():
            self.counts[name] += int(more)

    def _answer(self, generation: Any, stops: Iterable[str]) -> str:
        text, begins = generation.text, thinking_state(generation.prompt_ids, self.tokenizer)
        last = generation.response_ids[-1:]
        if generation.finished and last and last[0] in eos_ids(self.model.model, self.tokenizer):
            as_is = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            text = text.removesuffix(self.tokenizer.decode(last, **as_is))
        if begins != CLOSED:
            thought, closed, answer = text.partition(THINK_CLOSE)
            if not closed and OPEN in (begins, state_of(thought)):
                return ""  # the cap fell into the thought: there is no answer
            # a blank line as stop text would leave nothing of any answer that follows a thought
            text = answer.lstrip() if closed else text
        for stop in stops:
            text = text.split(stop, 1)[0] if stop else text
        return text

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is the greedy one) of (texts, context ids, continuation ids)."""
        import torch

        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]) + len(requests[i][2]))
        for start in range(0, len(order), self.size):
            places = order[start : start + self.size]
            rows = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in places]
            width = max(len(r) - 1 for r in rows)
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for b, row in enumerate(rows):  # padded on the right: a causal model never looks there
                ids[b, : len(row) - 1] = torch.tensor(row[:-1])
                mask[b, : len(row) - 1] = 1
            device = input_device(self.model.model)
            with torch.inference_mode():
                logits = self.model.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            for b, (i, row) in enumerate(zip(places, rows, strict=True)):
                n = min(len(requests[i][2]), len(row) - 1)
                part = logits[b, len(row) - 1 - n : len(row) - 1].float().log_softmax(-1).cpu()
                wanted = torch.tensor(row[len(row) - n :])
                greedy = bool((part.argmax(-1) == wanted).all())
                found[i] = (float(part.gather(1, wanted[:, None]).double().sum()), greedy)
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log p of whole texts, in windows of the model's length."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = [
            [
                ((text, ""), *make_disjoint_window(w))
                for w in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            ]
            for (text,) in (request.args for request in requests)
        ]
        values = iter(self._loglikelihood_tokens([w for text in windows for w in text]))
        return [sum(next(values)[0] for _ in text) for text in windows]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {
            "neureasoner_plan": self.model.plan.name,
            "neureasoner_rules": [r.name for r in self.model.plan.rules],
            "neureasoner_counts": dict(self.counts),
            "loglikelihood": "plain model: the plan acts only where tokens are generated",
        }


def _settings(given: Any, max_gen_toks: int) -> tuple[list[str], Sampling]:
    """A task's generation settings -> (stop texts, sampling). Raises UserError for one that cannot be kept."""
    settings = dict(given or {})
    until = settings.pop("until", None) or []
    stops = [until] if isinstance(until, str) else [str(s) for s in until]
    caps = [settings.pop(k) for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in settings]
    wanted = settings.pop("temperature", None)
    drawn = bool(settings.pop("do_sample", float(wanted or 0) > 0))
    temperature = float(1.0 if wanted is None else wanted) if drawn else 0.0
    cap, top_p = int(caps[0] if caps else max_gen_toks), float(settings.pop("top_p", 1.0) or 1.0)
    sampling = Sampling(
        cap, temperature, top_p, int(settings.pop("top_k", 0) or 0), float(settings.pop("min_p", 0) or 0)
    )
    if settings:
        raise UserError(
            f"generation setting '{next(iter(settings))}' of this task is not offered under a plan; known: until, "
            "max_gen_toks, do_sample, temperature, top_p, top_k, min_p"
        )
    return stops, sampling


def _here(device: str | None) -> str | None:
    """The device asked for. The harness asks for the first GPU when nobody names one, also where there is none."""
    import torch

    if device and device.startswith("cuda") and not torch.cuda.is_available():
        log.warning("no GPU here: device '%s' is not used", device)
        return None
    return device or None


def _tell(bar: Any, task: Any, before: int, done: int, _: int) -> None:
    bar.update(task, completed=before + done)


if __name__ == "__main__":
    if MISSING:
        raise SystemExit(MISSING)
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
