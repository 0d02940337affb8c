"""The tiny reasoner's training corpus and tokenizer: correct first-person traces, made from a seed.

No trace holds a wrong step or makes an attempt twice (a test reviews a sample): what the trained model gets wrong is
its own doing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING

from neureasoner.data_builders.families import FAMILIES, family
from neureasoner.traces import NO_THINKING, THINK_CLOSE, THINK_OPEN, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "validation", "test")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def same_question(question: str) -> str:
    """What two questions that differ in the order of their words and numbers have in common."""
    return " ".join(sorted(question.replace(",", " ").replace(".", " ").split()))


def split_of(question: str) -> str:
    """The split a question belongs to, by a hash of its numbers and words: 80 % train, 10 % validation, 10 % test.

    The words are sorted first, so that a question with its numbers in another order is the same question. Two problem
    files of different splits therefore share none, whatever their seeds.
    """
    words = same_question(question)
    bucket = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big") % 10
    return SPLITS[max(0, bucket - 7)]


def draw(rng: Random, name: str, difficulty: int, split: str) -> tuple[str, str]:
    """One (question, answer) of a family whose question lies in the split."""
    while True:
        question, answer = family(name).generate(rng, difficulty)
        if split_of(question) == split:
            return question, answer


def traces(seed: int, n: int, no_thinking: float = 0.08) -> Iterator[tuple[str, str]]:
    """n pairs (question, response) of the training split; a share answers without thinking, as hybrid models do."""
    rng, names = Random(seed), list(FAMILIES)
    for i in range(n):
        f = FAMILIES[names[i % len(names)]]
        question, _ = draw(rng, f.name, rng.randint(1, f.levels), "train")
        told = f.narrate(f.parse(question), rng)
        thinking = NO_THINKING if rng.random() < no_thinking else "\n\n".join(told.paragraphs) + f"\n{THINK_CLOSE}\n\n"
        yield question, thinking + told.answer


def notes(seed: int, n: int) -> Iterator[tuple[str, str]]:
    """About n exercises in proofreading: somebody else's text stands in the question, with one error or going round.

    The response names the error, or sums up the attempts, and goes on rightly. Large models know how to read proof;
    this one has to be shown, or fine-tuning would have to teach the words of a diagnosis besides when to make one.
    There is no trigger and no tag in it, and nothing wrong but what it quotes.
    """
    from neureasoner.data_builders.rewriters import ExactRewriter, Rejected, reference_from

    rng, rewriter, names = Random(f"notes-{seed}"), ExactRewriter(), list(FAMILIES)
    for i, (question, response) in enumerate(traces(seed + 1_000_003, n, no_thinking=0.0)):
        name = names[i % len(names)]
        ref = reference_from(str(i), Problem(str(i), name, 0, question, ""), response, "corpus")
        circling = rng.random() < 0.35
        try:
            row = rewriter.inter(ref, rng) if circling else rewriter.intra(ref, rng)
        except Rejected:
            continue
        assert row.trigger_span and row.block_span
        wrote = row.response[: row.trigger_span[0]].strip().replace("\n\n", " ")
        block = row.response[row.block_span[0] : row.block_span[1]].split("] ", 1)[1]
        rest = row.response[row.block_span[1] :]
        if circling:
            yield f'{question} Somebody wrote: "{wrote}" Go on from there.', block + rest
        else:
            repair = rest.strip().split("\n\n", 1)[0]
            answer = f"{block}\n\n{repair}\n{THINK_CLOSE}\n\nIt is fixed now."
            yield f'{question} Somebody wrote: "{wrote}" Find the error and fix it.', answer


def build_tokenizer(seed: int = 0, n: int = 3000, vocabulary: int = 632) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the corpus: single digits (with or without the space before), ``.\\n\\n`` merged."""
    from itertools import chain

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>", THINK_OPEN, THINK_CLOSE]
    tok = Tokenizer(models.BPE())
    pattern = r" ?\d| ?[^\W\d_]+| ?[^\s\w]+[\r\n]*|\s+|_+"
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pairs = (q + "\n" + r for q, r in chain(traces(seed, n), notes(seed, n)))
    tok.train_from_iterator(chain(pairs, ["[FAILURE_INTRA] ", "[FAILURE_INTER] "] * n), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
