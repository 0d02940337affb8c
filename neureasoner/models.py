"""Load a model by name, and tell one set of weights from another. No pickle, no remote code."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from neureasoner.artifacts import fingerprint as hash_of
from neureasoner.errors import UserError
from neureasoner.model_files import model_files, resolve
from neureasoner.sites import SUPPORTED, Layout
from neureasoner.spelling import loses

if TYPE_CHECKING:
    import torch

__all__ = [
    "default_device",
    "fingerprint",
    "input_device",
    "load",
    "load_tokenizer",
    "loses",
    "model_files",
    "resolve",
    "tokenizer_fingerprint",
]

SAMPLE = 64  # values of each parameter that enter the fingerprint


def default_device() -> torch.device:
    """CUDA where there is one, else CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def input_device(model: Any) -> torch.device:
    """Where token ids have to be for ``model``: where its embedding runs. Never ``meta``.

    Weights that accelerate keeps elsewhere (on the CPU, on disk) are ``meta`` between two calls; its hook knows where
    they run. Raises UserError for a model without weights.
    """
    import torch

    embedding = model.get_input_embeddings()
    for module in (embedding, model):
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    found: torch.device = next(embedding.parameters()).device
    if found.type == "meta":
        raise UserError(f"{type(model).__name__} has no weights (its embedding is on the device meta); load them first")
    return found


def load_tokenizer(name: str) -> Any:
    """The tokenizer of ``name``, padding on the left, with a padding token. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)
    except (OSError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"model '{name}': the tokenizer cannot be loaded ({_first_line(e)})") from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(name: str, device: Any = None, dtype: Any = None) -> tuple[Any, Any]:
    """``(model in eval mode, tokenizer)`` of a folder, a hub id or ``tiny``.

    ``device``: default CUDA where there is one. ``dtype`` (a torch dtype or its name): default float32 on CPU, bfloat16
    on a GPU. Raises UserError for a missing model and, before reading weights, for an unknown architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = default_device() if device is None else torch.device(device)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise UserError("dtype is unknown; use float32, bfloat16 or float16")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    source = resolve(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type not in SUPPORTED.values():
            raise UserError(
                f"model '{name}': architecture {(config.architectures or ['?'])[0]} (model_type {config.model_type}) "
                f"is not supported; use one of {', '.join(SUPPORTED)}"
            )
        model = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"model '{name}': cannot be loaded ({_first_line(e)})") from None
    Layout.of(model)
    return model.to(device).eval(), load_tokenizer(name)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Content hash of which id every token has."""
    return hash_of(tokenizer.get_vocab())


def fingerprint(model: Any) -> str:
    """Content hash of the weights, to bind a probe to the model it was fitted on.

    Hashes the sizes, every parameter's name and shape, and an evenly strided sample of its values. The sample is
    rounded to bfloat16 first, so a checkpoint has one fingerprint whether it is loaded in float32 or bfloat16.
    """
    import torch

    layout = Layout.of(model)
    sizes = (layout.model_type, layout.hidden_size, layout.n_heads, layout.n_kv_heads, layout.head_dim)
    shapes, samples = [], []
    for name, value in sorted(model.named_parameters()):
        shapes.append((name, tuple(value.shape)))
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // SAMPLE))]
        samples.append(sample.to(torch.bfloat16).float().cpu())
    values = torch.cat(samples).numpy().tobytes()
    return hash_of(sizes, layout.n_layers, layout.intermediate_size, shapes, hashlib.sha256(values).hexdigest())
