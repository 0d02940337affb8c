"""Train the tiny reasoner from nothing, on traces made from a seed.

    accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \\
        training/pretrain.py --config configs/recipes/tiny/pretrain.yaml

Stop it at any time; the same command goes on from the last checkpoint (``resume_from_checkpoint``: another one). The
traces are made from ``--corpus_seed`` and seen once each, in an order fixed by it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from neureasoner.errors import UserError
from neureasoner.training import arguments


@dataclass
class ReasonerArguments:
    """The model's shape and the corpus. The defaults are the shipped reasoner's."""

    examples: int = field(default=100_000, metadata={"help": "how many traces to make; each is seen once"})
    corpus_seed: int = field(default=0, metadata={"help": "seed of the traces and of their order"})
    hidden_size: int = field(default=192, metadata={"help": "width D of the residual stream"})
    intermediate_size: int = field(default=512, metadata={"help": "MLP neurons per block"})
    layers: int = field(default=6, metadata={"help": "decoder blocks"})
    heads: int = field(default=8, metadata={"help": "query heads"})
    kv_heads: int = field(default=2, metadata={"help": "key/value heads"})
    head_dim: int = field(default=32, metadata={"help": "size of a head; heads * head_dim differs from hidden_size"})
    notes: float = field(default=0.2, metadata={"help": "exercises in proofreading, as a share of the traces"})
    export: str = field(default="", metadata={"help": "also write the bfloat16 model here (what the package ships)"})

    def __post_init__(self) -> None:
        for key in ("examples", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.heads % self.kv_heads:
            raise UserError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        if self.notes < 0:
            raise UserError(f"notes is a share of the traces, got {self.notes:g}")


# Options of the Trainer that would not do what they say: (values that change nothing, what holds instead).
_ORDER = "the corpus comes in its own order, fixed by corpus_seed"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "eval_strategy": (("no",), "every trace is trained on, none is held out"),
    "eval_on_start": ((False,), "every trace is trained on, none is held out"),
    "train_sampling_strategy": ((), _ORDER),
    "data_seed": ((None,), _ORDER),
    "auto_find_batch_size": ((False,), "batches of like length are made before; lower per_device_train_batch_size"),
    "label_names": ((None, ["labels"]), "labels are fixed: the prompt never trains"),
    "save_only_model": ((False,), "such a checkpoint cannot be resumed; save_strategy: 'no' writes none"),
    "push_to_hub": ((False,), "checkpoints hold torch files; upload the export instead"),
    "remove_unused_columns": ((True,), "there is no other column"),
}


def encode_corpus(examples: int, notes_share: float, seed: int, batch: int, tokenizer) -> list[dict[str, list[int]]]:  # type: ignore[no-untyped-def]
    """Tokenise the traces and order them so that every batch holds traces of like length.

    Batches are shuffled, so the lengths still come in random order. Labels are -100 on the prompt.
    """
    import numpy as np

    from neureasoner.data_builders.corpus import notes, traces

    rows = []
    for question, response in chain(traces(seed, examples), notes(seed, round(notes_share * examples))):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        n = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(prompt + response + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        if len(ids) <= tokenizer.model_max_length:
            rows.append({"input_ids": ids, "labels": [-100] * n + ids[n:]})
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    pools = [order[i : i + 64 * batch] for i in range(0, len(order), 64 * batch)]
    ordered = [sorted(pool.tolist(), key=lambda i: len(rows[i]["input_ids"])) for pool in pools]
    batches = [pool[i : i + batch] for pool in ordered for i in range(0, len(pool), batch)]
    whole = [b for b in batches if len(b) == batch]
    return [rows[i] for b in rng.permutation(len(whole)).tolist() for i in whole[b]]


def collate(rows: list[dict[str, list[int]]], pad: int):  # type: ignore[no-untyped-def]
    """Pad on the right. No attention mask: a causal model never looks right, and attention is faster without one."""
    import torch

    width = max(len(r["input_ids"]) for r in rows)
    fill = {"input_ids": pad, "labels": -100}
    return {k: torch.tensor([r[k] + [v] * (width - len(r[k])) for r in rows]) for k, v in fill.items()}


def parse(argv: Sequence[str] | None = None) -> tuple[ReasonerArguments, Any]:
    """Command line and YAML file → (model and corpus, the Trainer's arguments). Raises UserError with one line."""
    import torch
    from transformers import TrainingArguments

    def presets(written: Mapping[str, Any]) -> dict[str, Any]:
        arguments.refuse_best(written)
        return {"use_cpu": not torch.cuda.is_available()}

    (reasoner, args), written = arguments.parse([ReasonerArguments, TrainingArguments], argv, presets)
    arguments.check_numbers(args)
    arguments.check_machine(args)
    arguments.check_loggers(args)
    arguments.check_refused(args, written, REFUSED)
    return reasoner, args


def main(argv: Sequence[str] | None = None) -> None:
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, set_seed

    from neureasoner.data_builders.corpus import build_tokenizer
    from neureasoner.training.checkpoints import WholeCheckpoints, check_resumable, resume_point
    from neureasoner.training.effect import Moved, check_rates
    from neureasoner.training.finite import FiniteLoss, Guard

    class InOrder(FiniteLoss, WholeCheckpoints, Trainer):  # type: ignore[misc]
        """The corpus is already in its order."""

        def _get_train_sampler(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            return SequentialSampler(self.train_dataset)

    reasoner, args = parse(argv)
    checkpoint = resume_point(args.resume_from_checkpoint, args.output_dir)
    set_seed(args.seed)

    tokenizer = build_tokenizer(reasoner.corpus_seed)
    with args.main_process_first(desc="corpus"):
        rows = encode_corpus(
            reasoner.examples,
            reasoner.notes,
            reasoner.corpus_seed,
            args.per_device_train_batch_size * args.world_size,
            tokenizer,
        )
    batch = args.per_device_train_batch_size * args.world_size
    if not rows:
        raise UserError(
            f"examples {reasoner.examples} make no whole batch of {batch} traces; raise it, or lower the batch"
        )
    updates = check_rates(args, len(rows))
    if checkpoint:
        check_resumable(checkpoint, args.output_dir, updates, adapter=False)
    data = Dataset.from_list(rows)
    tokens = sum(len(r["input_ids"]) for r in rows)
    print(f"{len(rows):,} traces, {tokens:,} tokens, vocabulary {len(tokenizer)}", flush=True)
    config = Qwen3Config(
        vocab_size=-(-(len(tokenizer) + 8) // 64) * 64,
        hidden_size=reasoner.hidden_size,
        intermediate_size=reasoner.intermediate_size,
        num_hidden_layers=reasoner.layers,
        num_attention_heads=reasoner.heads,
        num_key_value_heads=reasoner.kv_heads,
        head_dim=reasoner.head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = Qwen3ForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    trainer = InOrder(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    moved = Moved(model)
    trainer.add_callback(moved)
    trainer.add_callback(Guard())
    trainer.train(resume_from_checkpoint=checkpoint)
    still = moved.check(trainer, "the updates are below the weights' precision; raise learning_rate")
    if still:
        print(f"training pretrain: {still}")
    trainer.save_model()
    if reasoner.export and trainer.is_world_process_zero():
        model.to(dtype=torch.bfloat16).save_pretrained(reasoner.export)
        tokenizer.save_pretrained(reasoner.export)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
