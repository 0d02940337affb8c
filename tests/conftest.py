"""Fixtures of every room: a tokenizer and random models small enough to build in milliseconds. Offline, CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

SENTENCES = [
    "Okay, let me think about 12 + 30 = 42.\n\nWait, that is wrong. Let me check again:\n\nSo the answer is 7)\n\n",
    "First I try 3 * 8 - 5 = 19.\n\nThat does not reach 24. Another route: 6 * 4 = 24.\n\nDone.\n</think>\n\n",
    "The answer is \\boxed{42}. Tom has 3 apples and buys 14 more.\n\nHow many are left?\n\n\nNone.\n",
] * 8
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# Qwen2's: digits alone, punctuation together with the newlines after it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def build_tokenizer() -> Any:
    """Byte-level BPE with the habits of real ones: single digits, ``.\\n\\n`` merged, template ending in <think>."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    # <think> and </think> are plain added tokens, as in Qwen3: skip_special_tokens keeps them
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL[:3]])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in SPECIAL[3:]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        padding_side="left",
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """See ``build_tokenizer``. Shared by the session: copy it before adding tokens."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_model(tiny_tokenizer: Any) -> Callable[..., Any]:
    """``make_model(arch="qwen3", seed=0, **config_overrides)``: a new random model, float32, eval.

    ``arch`` is llama, qwen2 or qwen3. Two blocks, D 32, 4 query heads and 2 key/value heads of size 12 (so
    ``head_dim * heads != hidden_size``), 48 neurons a block, a few vocabulary rows more than the tokenizer.
    """

    def make(arch: str = "qwen3", seed: int = 0, **overrides: Any) -> Any:
        import transformers

        name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[arch]
        settings = {
            "vocab_size": len(tiny_tokenizer) + 5,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,  # large, so that greedy decoding does not repeat one token
            "pad_token_id": tiny_tokenizer.pad_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "bos_token_id": None,
        }
        config = getattr(transformers, f"{name}Config")(**(settings | overrides))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, f"{name}ForCausalLM")(config)
        return model.to(torch.float32).eval()

    return make


@pytest.fixture(autouse=True)
def _same_randomness() -> Iterator[None]:
    """Every test starts from the same global seed and leaves none behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def stock_config() -> Callable[..., Any]:
    """``stock_config(model, tokenizer, n, temperature=0, top_p=1, **more)``: settings for Transformers' own
    ``generate``, the oracle of our sampler."""

    def make(model: Any, tokenizer: Any, n: int, temperature: float = 0.0, top_p: float = 1.0, **more: Any) -> Any:
        from transformers import GenerationConfig

        ends = model.generation_config.eos_token_id
        ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        settings = {"max_new_tokens": n, "do_sample": False, "repetition_penalty": 1.0, **drawn}
        pads = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": [e for e in ends if e is not None]}
        return GenerationConfig(**(settings | pads | more))

    return make
