"""Load a model by name, and tell one set of weights from another. No pickle, no remote code."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neureasoner.errors import UserError
from neureasoner.fingerprints import fingerprint, known_as, tokenizer_fingerprint
from neureasoner.model_files import SHIPPED, model_files, resolve
from neureasoner.sites import SUPPORTED, Layout, quantisation, refuse_quantised, runs_on
from neureasoner.spelling import SAMPLE, loses
from neureasoner.weights import CONFIGS, GENERATION, TOKENIZERS, check_texts, check_weights

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
BODY = re.compile(r"(model\.)?(embed_tokens|layers|norm)\.")  # what every supported model is made of, its heads apart

__all__ = [
    "default_device",
    "fingerprint",
    "input_device",
    "known_as",
    "load",
    "load_tokenizer",
    "loses",
    "model_files",
    "read_config",
    "read_tokenizer",
    "resolve",
    "stored_dtype",
    "tokenizer_fingerprint",
]


def default_device() -> torch.device:
    """CUDA where there is one, else CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def input_device(model: Any) -> torch.device:
    """Where token ids have to be for ``model``: where its embedding runs. Never ``meta``.

    Raises UserError for a model without weights.
    """
    device = runs_on(model.get_input_embeddings(), model)
    if device.type == "meta":
        raise UserError(f"{type(model).__name__} has no weights (its embedding is on the device meta); load them first")
    return device


def load_tokenizer(name: str) -> Any:
    """The tokenizer of ``name``, padding on the left, with a padding token where it has an end token to pad with.

    Raises UserError for one that cannot be read, has no vocabulary, or drops characters of plain English text.
    """
    source = resolve(name)
    tokenizer = read_tokenizer(source, name)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(source: str | Path, name: str = "") -> Any:
    """The tokenizer that lies in a folder or at a hub id, as it is. Raises UserError as ``load_tokenizer``."""
    from transformers import AutoTokenizer

    name, folder, fix = name or str(source), Path(source), ""
    what = f"{_called(name)}: the tokenizer cannot be loaded"
    if folder.is_dir():
        try:
            check_texts(folder, TOKENIZERS)
        except UserError as e:
            raise UserError(f"{what}: {e}") from None
        if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            fix = "; its tokenizer.model is read with `pip install sentencepiece protobuf` or `pip install tiktoken`"
    with _one_line(what, AttributeError, TypeError, fix=fix):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        added = tokenizer.get_added_vocab().keys()
        known, lost = tokenizer.get_vocab().keys() - added, loses(tokenizer, SAMPLE)
    if not known:
        raise UserError(
            f"{_called(name)}: the tokenizer has no vocabulary but its {len(added)} added tokens; the file of the "
            "vocabulary (tokenizer.json) is missing: download or copy it"
        )
    if lost is not None:
        raise UserError(
            f"{_called(name)}: the tokenizer cannot spell plain text, {len(lost)} of its characters are lost "
            f"({lost[:20]!r}); its files are damaged, or it is not made for text"
        )
    return tokenizer


def load(name: str, device: Any = None, dtype: Any = None, device_map: Any = None) -> tuple[Any, Any]:
    """``(model in eval mode, tokenizer)`` of a folder, a hub id or ``tiny``.

    ``device``: default CUDA where there is one. ``device_map`` instead of it (``auto``, ``balanced``, a device, or a
    dictionary of modules) spreads the weights over GPUs, CPU and disk, as Transformers does. ``dtype`` (a torch dtype
    or its name): default float32 on CPU, bfloat16 on a GPU. Raises UserError, before weights are read wherever files
    and headers tell, for a model that is missing, damaged, quantised, without some of its weights, of an unknown
    architecture, or smaller than its tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place = _place(device, device_map)
    wanted = _dtype(dtype) or (torch.bfloat16 if _uses_gpu(place) else torch.float32)
    config = _config(name)
    tokenizer = load_tokenizer(name)
    _check_vocabulary(name, tokenizer, config.vocab_size)
    source = resolve(name)
    with _one_line(f"{_called(name)}: cannot be loaded"), _without_reports():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            # absolute: the fingerprint of a float16 model looks into the folder again
            str(Path(source).resolve()) if Path(source).is_dir() else source,
            config=config,
            dtype=wanted,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, with names and sizes
            output_loading_info=True,
            **({} if device_map is None else {"device_map": place}),
        )
        model, info = loaded
        _check_loaded(name, info)
        Layout.of(model)
        if device_map is None:
            model.to(place)
    return model.eval(), tokenizer


def stored_dtype(name: str) -> torch.dtype:
    """The dtype a model is stored in; float32 where its config says nothing. Raises UserError as ``load``."""
    import torch

    dtype: torch.dtype | None = _config(name).dtype
    return dtype or torch.float32


def read_config(name: str) -> Any:
    """The config of a folder, a hub id or ``tiny``, of any architecture. Raises UserError."""
    from transformers import AutoConfig

    source = resolve(name)
    if Path(source).is_dir():
        check_texts(Path(source), CONFIGS)
    with _one_line(f"{_called(name)}: its config.json cannot be used", AttributeError, TypeError):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _config(name: str) -> Any:
    """The config of a model that can be loaded, as far as it and the files' headers tell. Raises UserError."""
    from transformers import GenerationConfig

    config, folder = read_config(name), Path(resolve(name))
    if config.model_type not in SUPPORTED.values():
        raise UserError(
            f"model '{name}': architecture {(config.architectures or ['?'])[0]} (model_type {config.model_type}) "
            f"is not supported; use one of {', '.join(SUPPORTED)}"
        )
    if quantisation(config):
        refuse_quantised(f"model '{name}'", quantisation(config))
    if not -config.vocab_size <= (config.pad_token_id or 0) < max(config.vocab_size, 1):
        raise UserError(
            f"model '{name}': pad_token_id in its config.json is {config.pad_token_id}, but vocab_size "
            f"{config.vocab_size}; set it to an id of the tokenizer, or to null"
        )
    if folder.is_dir():
        check_weights(folder)
        if (folder / GENERATION).is_file():
            with _one_line(f"{folder / GENERATION}: cannot be used", AttributeError, TypeError):
                ends = GenerationConfig.from_pretrained(folder).eos_token_id
            if not all(isinstance(i, int) for i in (ends if isinstance(ends, list) else [ends or 0])):
                raise UserError(f"{folder / GENERATION}: eos_token_id is {ends!r}; it has to be an id or a list of ids")
    return config


def _place(device: Any, device_map: Any) -> Any:
    """A torch device, or a map that Transformers takes. Raises UserError for both, or a device that is not here."""
    if device is not None and device_map is not None:
        raise UserError(f"give device ({device}) or device_map ({device_map}), not both")
    if device_map is None:
        return default_device() if device is None else _device("device", device)
    if isinstance(device_map, Mapping):
        for value in device_map.values():
            if value != "disk":
                _device("device_map", value)
        return dict(device_map)
    if isinstance(device_map, str) and device_map in MAPS:
        return device_map
    return _device("device_map", device_map)


def _uses_gpu(place: Any) -> bool:
    import torch

    if isinstance(place, str):
        return torch.accelerator.is_available()
    devices = place.values() if isinstance(place, Mapping) else [place]
    return any(d != "disk" and _device("device_map", d).type != "cpu" for d in devices)


def _device(key: str, value: Any) -> torch.device:
    import torch

    number = value if isinstance(value, int) else None
    try:
        device = torch.device("cuda", number) if number is not None else torch.device(value)
    except (RuntimeError, TypeError):
        maps = f", or one of {', '.join(MAPS)}" if key == "device_map" else ""
        raise UserError(f"{key} '{value}' is unknown; use cpu, cuda or cuda:0{maps}") from None
    if device.type == "meta":
        raise UserError(f"{key} 'meta' holds no values; use cpu, cuda or cuda:0")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(
            f"{key} '{value}' is not on this machine ({count or 'no'} CUDA devices); use another, such as cpu"
        )
    return device


def _dtype(dtype: Any) -> torch.dtype | None:
    import torch

    if not dtype:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or str(found).removeprefix("torch.") not in (*DTYPES, "float64"):
        raise UserError(f"dtype '{dtype}' is unknown; use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return found


def _check_vocabulary(name: str, tokenizer: Any, rows: int) -> None:
    """More rows than tokens are usual; an id without a row is an index error in the first prompt that holds it.

    Transformers' own classes bring tokens that the folder does not name (Qwen2's ``<|endoftext|>``). Those without a
    row are no part of this model, so they neither end nor pad its texts.
    """
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    files = [Path(resolve(name)) / file for file in TOKENIZERS]
    named = "".join(file.read_text("utf-8") for file in files if file.is_file())
    own = [i for token, i in beyond.items() if not named or token in named or json.dumps(token)[1:-1] in named]
    if own:
        top = max(own)
        raise UserError(
            f"model '{name}': its tokenizer has ids up to {top}, the model by its config.json only {rows} rows of "
            "embeddings; use the tokenizer it was trained with, or save it after "
            f"model.resize_token_embeddings({top + 1})"
        )
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if getattr(tokenizer, role) in beyond:
            setattr(tokenizer, role, None)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def _check_loaded(name: str, info: Mapping[str, Any]) -> None:
    """Raises UserError for weights that the files lack, have in other sizes, or have and the config does not know."""

    def some(keys: list[str]) -> str:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        return f"{len(keys)}: {', '.join(keys[:3])}{more}"

    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, found, asked = mismatched[0]
        more = f" ({len(mismatched)} weights differ)" if len(mismatched) > 1 else ""
        raise UserError(
            f"model '{name}': {key} is {list(found)} in its files, {list(asked)} by its config.json{more}; "
            "they are of different models: put the right config.json beside the weights"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model '{name}': its files lack weights ({some(missing)}), which would be random; download or save the "
            "model again"
        )
    unknown = sorted(k for k in info["unexpected_keys"] if BODY.match(k))
    if unknown:
        raise UserError(
            f"model '{name}': its files hold weights that its config.json has no place for ({some(unknown)}); put the "
            "right config.json beside them"
        )
    others = sorted(info["unexpected_keys"])
    if others:
        warnings.warn(f"model '{name}': its files hold weights that are not used ({some(others)})", stacklevel=3)


def _called(name: str) -> str:
    """The model as an error names it; one that is no folder was looked for on the hub."""
    local = name in SHIPPED or Path(name).expanduser().is_dir()
    return f"model '{name}'" + ("" if local else " (no folder here, so taken for a hub id)")


@contextmanager
def _one_line(what: str, *more: type[Exception], fix: str = "") -> Iterator[None]:
    """Turn what libraries raise for a user's files, packages and memory into one line; other errors are bugs."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    kinds = (OSError, ValueError, KeyError, ZeroDivisionError, RuntimeError, SafetensorError, StrictDataclassError)
    known: tuple[type[Exception], ...] = (*kinds, *more)
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as e:
        fix = "use dtype bfloat16, a smaller model, or device_map auto"
        raise UserError(f"{what}: the device has too little memory ({_first_line(e)}); {fix}") from None
    except ImportError as e:
        raise UserError(f"{what}: a package is missing ({_first_line(e)}){fix or '; install it'}") from None
    except Exception as e:
        if not isinstance(e, known) and type(e) is not Exception:  # the tokenizers library raises bare ones
            raise
        raise UserError(f"{what} ({_first_line(e)}){fix}") from None


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep Transformers' table of missing weights off the screen: ``_check_loaded`` tells it in a line."""
    log = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # "Validation error for field 'x':" goes on in the next line
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
    return f"{type(error).__name__} {text}" if isinstance(error, KeyError) else text
