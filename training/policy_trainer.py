"""TRL's RLOO, GRPO and SFT trainers, with what bias-only adaptation adds to them (core.md §4.2).

Legend: ``N`` responses of one update over all devices, ``A_i`` advantage of response ``i``, ``T`` its tokens.

What is TRL's: the order of problems, groups, rewards gathered over devices, leave-one-out (RLOO) and group (GRPO)
advantages, log-probabilities, the optimiser loop, GRPO's loss. What is ours, and why:

- **RLOO's loss.** TRL 1.16 averages ``A_i * Σ_t log π`` over responses; the paper divides the sum by the number of
  generated tokens of the global batch. ``RlooTrainer`` computes the paper's, exactly: one update per batch, so no
  ratio, no clipping, no KL, no division by a standard deviation. Responses with advantage 0 add nothing to its gradient
  and are not read again; their tokens still count in the denominator. The log-probabilities that TRL's ratio would need
  are not computed.
- **GRPO's loss** is TRL's, by the names of its settings: ``scale_rewards`` none and ``loss_type`` dapo give RLOO's
  gradient times ``(G - 1) / G``, for its baseline holds the response itself; ``beta`` is k3's weight. Its clipping has
  no effect at one update per batch.
- **Sampling** is ``sampler.sample``. Each step draws from a seed of its own, so a resumed run draws what the
  uninterrupted one does. How far trainer and sampler differ in the log-probability of a sampled token is logged as
  ``gap``.
- **Batches** of a backward pass hold responses of like length, cut to the longest; TRL mixes and pads them.
- **Checkpoints** of the vectors arm hold the vectors, not the model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl import GRPOTrainer, RLOOTrainer, SFTTrainer
from trl.trainer.utils import RepeatSampler

from neureasoner.artifacts import read_tensors, write_tensors
from neureasoner.errors import UserError
from neureasoner.prompts import encode_text
from neureasoner.sampler import sample
from neureasoner.sampling import Sampling, pad_id
from neureasoner.traces import Problem
from neureasoner.training.batches import LikeLengths, Lines
from neureasoner.training.checkpoints import WholeCheckpoints
from neureasoner.training.finite import FiniteLoss
from neureasoner.training.policy_measure import text_of
from neureasoner.training.rewards import Reward, is_right, scored
from neureasoner.training.vectors import BiasVectors

VECTORS_FILE = "bias_vectors.safetensors"
GAP = 0.02  # mean difference of log-probabilities above which trainer and sampler are not one model
_PROMPT, _RESPONSE = ("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask")
_PER_TOKEN = (*_RESPONSE, "sampling_per_token_logps", "old_per_token_logps", "ref_per_token_logps")


@dataclass
class Task:
    """What responses are drawn for and how they are rewarded."""

    problems: Sequence[Problem]
    reward: Reward
    answer: str
    seed: int


class PolicyLines(Lines):
    """``step 10/150  right 43%  184 tokens  2% cut off  8.2 s (sampling 4.3)  19:10 left``; the loss of SFT."""

    def shown(self, logs: Mapping[str, float]) -> list[str]:
        """What of a log is printed; nothing of one without a loss."""
        if not {"right", "loss"} <= set(logs):
            return super().shown(logs)
        return [
            f"right {float(logs['right']):.0%}",
            f"{float(logs['completions/mean_length']):.0f} tokens",
            f"{float(logs['completions/clipped_ratio']):.0%} cut off",
            f"{float(logs['step_time']):.1f} s (sampling {float(logs['sampling_time']):.1f})",
        ]


class Checked(FiniteLoss, WholeCheckpoints):
    """Shared by all three: errors at the first number that is none, and checkpoints of the vectors alone."""

    vectors: BiasVectors | None = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.vectors is None:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        elif self.args.should_save:  # type: ignore[attr-defined]
            folder = Path(output_dir or self.args.output_dir)  # type: ignore[attr-defined]
            write_tensors(folder / VECTORS_FILE, {"bias": self.vectors.stack()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.vectors is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            self.vectors.set(read_tensors(Path(resume_from_checkpoint) / VECTORS_FILE)[0]["bias"])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None for checkpoints."""


class ByEpoch(RepeatSampler):  # type: ignore[misc]
    """TRL's order of problems, drawn from seed and epoch. (TRL goes on drawing from one generator, so that a run
    resumed after its first epoch would get the first order again.)"""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.generator.manual_seed(int(np.random.SeedSequence([self.seed or 0, epoch]).generate_state(1)[0]))


class OnPolicy(Checked):
    """Shared by RLOO and GRPO: our prompts, rewards, sampler and batches. Set ``task`` before training."""

    task: Task
    _parts: list[dict[str, torch.Tensor]]

    def reward_of(self, completion_ids: list[list[int]], row: list[int], log_metric: Any, **_: Any) -> list[float]:
        """The reward function as TRL calls it. ``row``: index of each response's problem."""
        problems = [self.task.problems[i] for i in row]
        texts = [text_of(self.processing_class, ids) for ids in completion_ids]  # type: ignore[attr-defined]
        finished = [ids[-1] in self.eos_token_ids for ids in completion_ids]  # type: ignore[attr-defined]
        jobs = list(zip(problems, texts, finished, strict=True))
        log_metric("right", float(np.mean([is_right(*job, self.task.answer) for job in jobs])))
        return scored(self.task.reward, problems, texts, finished)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [encode_text(self.processing_class, p) for p in prompts], None, {}  # type: ignore[attr-defined]

    def _draw(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        me: Any = self
        drawn = sample(
            me.accelerator.unwrap_model(me.model),
            prompt_ids,
            Sampling(me.max_completion_length, me.temperature, top_p=1.0),
            ends=me.eos_token_ids,
            pad=pad_id(me.processing_class, me.eos_token_ids),
            seed=int(torch.randint(0, 2**31 - 1, ())),
            logprobs=True,
        ).rows
        return [row.ids for row in drawn], [row.logprobs for row in drawn]

    def _prepare_inputs(self, rows: Any) -> dict[str, torch.Tensor]:
        """Draw and score a batch for each update, split it for the backward passes, hand out the next part."""
        me: Any = self
        n, begin = me.args.steps_per_generation, time.perf_counter()
        if me._step % n == 0:
            key = [self.task.seed, me.state.global_step, me.accelerator.process_index]
            device = me.accelerator.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
                batch = me._generate_and_score_completions(rows)
            self._parts = split(batch, n, drop=self.drops)
            me._metrics["train"]["sampling_time"].append(time.perf_counter() - begin)
        return self._parts[me._step % n]

    def _get_train_sampler(self, dataset: Any = None) -> ByEpoch:
        me: Any = self
        return ByEpoch(
            data_source=me.train_dataset if dataset is None else dataset,
            mini_repeat_count=me.num_generations,
            batch_size=me.args.generation_batch_size // me.num_generations,
            repeat_count=me.args.steps_per_generation,
            seed=me.args.seed,
        )

    drops = False  # may responses with advantage 0 be left out?

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        out = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)  # type: ignore[misc]
        if torch.is_grad_enabled():
            self._note_gap(out[0].detach())
        return out

    def _note_gap(self, logps: torch.Tensor) -> None:
        me: Any = self
        part = self._parts[me._step % me.args.steps_per_generation]
        mask = part["completion_mask"].bool()
        gap = float((logps - part["sampling_per_token_logps"])[mask].abs().mean())
        me._metrics["train"]["gap"].append(gap)
        if gap > GAP:
            raise UserError(
                f"step {me.state.global_step + 1}: trainer and sampler differ by {gap:.3f} in the log-probability of a "
                f"sampled token (mean; at most {GAP} is let pass), so they are not the same model; train in float32"
            )


class RlooTrainer(OnPolicy, RLOOTrainer):  # type: ignore[misc]
    """The loss of core.md §4.2: ``-(Σ_i A_i Σ_t log π(y_it)) / (generated tokens of the global batch)``."""

    loss_is_scaled_for_ga = True  # the denominator is the whole batch's already
    drops = True

    def _generate_single_turn(self, prompt_ids: Any, *args: Any) -> list[list[int]]:
        ids, self._logprobs = self._draw(prompt_ids)
        return ids

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"]
        logprobs = torch.zeros(mask.shape)
        for row, values in enumerate(self._logprobs):
            logprobs[row, : len(values)] = torch.tensor(values)
        batch["sampling_per_token_logps"] = logprobs.to(mask.device)
        batch["tokens"] = self.accelerator.gather(mask.sum()).sum()
        return batch

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: Any, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        if not torch.is_grad_enabled():  # TRL's old log-probabilities: an update on fresh samples has no ratio
            return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = inputs["completion_mask"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attended = torch.cat([inputs["prompt_mask"], mask], dim=1)
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, attended, mask.shape[1], compute_entropy=True
        )
        self._metrics["train"]["entropy"].append(float((entropies.detach() * mask).sum() / mask.sum()))
        total = (inputs["advantages"] * (logps * mask).sum(1)).sum()
        # gradients are averaged over devices, so each one's share is multiplied by their number
        return -total / inputs["tokens"] * self.accelerator.num_processes


class GrpoTrainer(OnPolicy, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO on our samples."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return self._draw(prompt_ids)


class PlainTrainer(Checked, SFTTrainer):  # type: ignore[misc]
    """TRL's SFT, on batches of like length."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LikeLengths:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return LikeLengths([len(ids) for ids in rows["input_ids"]], self.args.train_batch_size, self.args.seed)


def split(batch: dict[str, torch.Tensor], n: int, drop: bool) -> list[dict[str, torch.Tensor]]:
    """A batch in ``n`` parts of like length, each cut to its longest prompt and response.

    ``drop``: leave out responses with advantage 0, as far as every part keeps one. Numbers are shared by all parts.
    """
    length = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
    rows = torch.arange(len(length), device=length.device)
    if drop:
        by_size = batch["advantages"].abs().argsort(descending=True, stable=True)
        rows = by_size[: max(n, int((batch["advantages"] != 0).sum()))]
    rows = rows[length[rows].argsort(stable=True)]
    return [_cut({k: v[part] if v.ndim else v for k, v in batch.items()}) for part in rows.tensor_split(n)]


def _cut(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prompt, response = (int(part[key].sum(1).max()) for key in ("prompt_mask", "completion_mask"))
    before = {k: part[k][:, part[k].shape[1] - prompt :] for k in _PROMPT}
    after = {k: part[k][:, :response] for k in _PER_TOKEN if k in part}
    return {**part, **before, **after}
