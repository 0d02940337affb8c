"""How much memory a run needs, computed from a model's shapes: parameters, gradients, optimizer, activations.

Counts are exact, bytes of state too; activations are those that backward needs, without what the allocator and the
communication buffers add (``MARGIN`` stands for them). docs/training.md has the table and what it assumes.

N parameters, K those that train, k devices, L blocks, D width, A = heads · head_dim, V = kv heads · head_dim,
F neurons per block, T tokens in one forward pass (rows · length). GiB = 2³⁰ bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neureasoner.errors import UserError
from neureasoner.training.tools_config import SizingConfig

GIB = 2**30
MARGIN = 0.1  # of everything else: CUDA's context, fragmentation, buffers of NCCL
TILE = 4096 * 32_768  # logits that TRL's fused head holds at a time

# layers, width, heads, kv_heads, head_dim, neurons, vocabulary, qkv_bias, qk_norm, tied
_PAPER = {
    "DeepSeek-R1-Distill-Qwen-7B": (28, 3584, 28, 4, 128, 18944, 152064, True, False, False),
    "DeepSeek-R1-Distill-Llama-8B": (32, 4096, 32, 8, 128, 14336, 128256, False, False, False),
    "Qwen3-8B": (36, 4096, 32, 8, 128, 12288, 151936, False, True, False),
    "DeepSeek-R1-Distill-Qwen-32B": (64, 5120, 40, 8, 128, 27648, 152064, True, False, False),
    "Qwen3-32B": (64, 5120, 64, 8, 128, 25600, 151936, False, True, False),
    "DeepSeek-R1-Distill-Llama-70B": (80, 8192, 64, 8, 128, 28672, 128256, False, False, False),
}


@dataclass(frozen=True)
class Shape:
    """What the count needs of a Llama-like model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    vocabulary: int
    qkv_bias: bool
    qk_norm: bool
    tied: bool

    def block(self) -> int:
        """Parameters of one block: attention, MLP, norms."""
        a, v = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.width * (a + v) + (a + 2 * v if self.qkv_bias else 0)
        norms = 2 * self.width + (2 * self.head_dim if self.qk_norm else 0)
        return attention + 3 * self.width * self.neurons + norms

    def matrix(self) -> int:
        """Parameters of the embedding (and of the head)."""
        return self.vocabulary * self.width

    def parameters(self) -> int:
        """N."""
        return self.layers * self.block() + self.width + self.matrix() * (1 if self.tied else 2)

    def adapter(self, rank: int, tokens: int = 2) -> int:
        """Parameters of LoRA on every linear layer, and of ``tokens`` trained rows of both matrices."""
        a, v, d, f = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.width, self.neurons
        sides = 2 * (d + a) + 2 * (d + v) + 3 * (d + f)
        return rank * self.layers * sides + tokens * d * (1 if self.tied else 2)

    def block_activations(self, tokens: int) -> int:
        """Values of one block that backward needs (SDPA or flash attention, so no score matrix)."""
        a, v = self.heads * self.head_dim, self.kv_heads * self.head_dim
        norms = 2 * (3 * self.width + 1)  # each norm's input, normalised input, output; one scale a token
        attention = 2 * a + 2 * v + self.heads + 2 * self.head_dim  # q, k, v, output; log-sum-exp; cosine and sine
        extra = 2 * (a + v) + self.heads + self.kv_heads if self.qk_norm else 0  # norms of q and k
        return tokens * (norms + attention + extra + 4 * self.neurons)  # gate, its activation, up, their product


def shape_of(config: Any) -> Shape:
    """The shape a Transformers config describes. Raises UserError for an architecture whose count is not known."""
    kinds = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}
    if config.model_type not in kinds:
        raise UserError(f"model_type '{config.model_type}': sizes are known of {', '.join(kinds)} only")
    bias, norm = kinds[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    return Shape(*values, head_dim, config.intermediate_size, config.vocab_size, bias, norm, config.tie_word_embeddings)


def shape(name: str) -> Shape:
    """The shape of one of the paper's models, a folder or a hub id."""
    known = _PAPER.get(name.rsplit("/", 1)[-1])
    if known:
        return Shape(*known)
    from neureasoner.models import read_config

    return shape_of(read_config(name))


def needs(shape: Shape, layout: str, config: SizingConfig) -> dict[str, float]:
    """Bytes of one GPU by what they hold, and ``host``: bytes of main memory over all machines.

    Full tuning holds 16 bytes a trained parameter, in every layout: with autocast (ddp, fsdp2) 4 weights, 4 gradients,
    8 Adam; under ZeRO 2 + 2 for compute, 12 for the float32 copy and Adam. LoRA's base is frozen: 2 bytes, no more.
    """
    n, k, t = shape.parameters(), config.devices, config.rows * config.length
    trained = shape.adapter(config.lora) if config.lora else n
    frozen = 2 * n if config.lora else 0
    zero = layout.startswith("zero")
    weights, gradients, optimizer = (2, 2, 12) if zero else (4, 4, 8)
    share = {"ddp": (1, 1, 1), "zero2": (1, k, k)}.get(layout, (k, k, k))
    found = {
        "weights": weights * trained / share[0] + frozen / share[0],
        "gradients": gradients * trained / share[1],
        "optimizer": optimizer * trained / share[2],
        "host": 0.0,
    }
    # what is gathered while it computes: two blocks (one ahead) or the largest matrix; autocast keeps bfloat16 copies
    if layout == "ddp":
        found["working"] = 0 if config.lora else 2 * n
    else:
        found["working"] = 0 if layout == "zero2" else 2 * max(2 * shape.block(), shape.matrix())
    if layout == "zero3_offload":
        found["host"] = (weights + gradients + optimizer) * trained + frozen
        found |= {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    residual = 4 if layout == "ddp" and not config.lora else 2  # autocast leaves the stream in the weights' dtype
    kept = 1 if config.checkpointing else shape.layers
    inside = 2 * shape.block_activations(t) + 2 * 2 * t * shape.width  # the norms compute in float32
    found["activations"] = float(residual * shape.layers * t * shape.width + kept * inside)
    found["head"] = 2.0 * min(TILE, t * shape.vocabulary) + 4.0 * (
        shape.matrix() + t * shape.width
    )  # a tile; gradients
    found["total"] = (1 + MARGIN) * sum(v for key, v in found.items() if key != "host")
    return found


def sizing(config: SizingConfig) -> dict[str, Any]:
    """Print the memory of one GPU for every model and layout. Returns ``{model: {layout: GiB by part}}``."""
    from rich.console import Console
    from rich.table import Table

    parts = ("weights", "gradients", "optimizer", "working", "activations", "head", "total", "host")
    table = Table(title=_title(config))
    for column in ("model", "N", "layout", *parts):
        table.add_column(column, justify="left" if column in ("model", "layout") else "right")
    result: dict[str, Any] = {}
    for name in config.models:
        size = shape(name)
        for i, layout in enumerate(config.layouts):
            found = {key: value / GIB for key, value in needs(size, layout, config).items()}
            result.setdefault(name, {})[layout] = {key: round(found[key], 2) for key in parts}
            fits = found["total"] <= config.device_memory
            shown = [f"{found[key]:,.1f}" for key in parts]
            shown[parts.index("total")] += "" if fits else " ✗"
            first = (name, f"{size.parameters() / 1e9:.2f} B") if i == 0 else ("", "")
            table.add_row(*first, layout, *shown, style="" if fits else "dim")
    Console(highlight=False).print(table)
    return result


def _title(config: SizingConfig) -> str:
    what = f"LoRA of rank {config.lora}" if config.lora else "all parameters"
    rows = f"{config.rows} × {config.length:,} tokens"
    return f"GiB a GPU: {what}, {config.devices} GPUs, {rows} (✗: more than {config.device_memory:g} GiB)"
