"""``neureasoner doctor``: what is installed, what the machine can do, and how a model behaves in our hands.

What will not work as one might think is listed below the table: versions that were not tested, a model that names no
end token, hooks that do not fire.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Mapping
from typing import Any

from neureasoner import __version__
from neureasoner.errors import UserError
from neureasoner.floor_config import DoctorConfig
from neureasoner.printable import safe
from neureasoner.prompts import encode_prompt
from neureasoner.thinking import CLOSED, OPEN, thinking_state

CORE = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "scikit-learn", "numpy", "safetensors"]
OPTIONAL = ["deepspeed", "vllm", "flash-attn", "openai", "reasoning-gym"]
NEW_TOKENS = 8


def versions() -> dict[str, str | None]:
    """Installed version of each package, None if absent. Imports none of them."""
    found: dict[str, str | None] = {}
    for name in CORE + OPTIONAL:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def untested(installed: Mapping[str, str | None]) -> dict[str, str]:
    """Packages whose installed version lies outside what this release was tested with, and that range."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(r) for r in importlib.metadata.requires("neureasoner") or []]
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was never installed
        return {}
    outside = {}
    for r in required:
        version = installed.get(r.name)
        if version is not None and not r.specifier.contains(version, prereleases=True):
            outside[r.name] = str(r.specifier)
    return outside


def machine() -> dict[str, Any]:
    """Devices, dtypes and attention back ends, each tried rather than looked up."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    dtypes = {}
    for device in devices:
        dtypes[device] = [
            str(d).removeprefix("torch.")
            for d in (torch.float32, torch.bfloat16, torch.float16)
            if _multiplies(torch.ones(2, 2, dtype=d), device)
        ]
    attention = ["eager", "sdpa"] + (["flash_attention_2"] if is_flash_attn_2_available() else [])
    return {"devices": devices, "dtypes": dtypes, "attention": attention}


def _multiplies(matrix: Any, device: str) -> bool:
    try:
        moved = matrix.to(device)
        return bool((moved @ moved).float().sum() == 8)
    except RuntimeError:
        return False


def check_model(name: str, device: str = "", dtype: str = "", device_map: str = "") -> dict[str, Any]:
    """Decode a few tokens with a hook of every kind in every layer, and compare a padded row with the row alone.

    Returns sizes, ``ends`` = the tokens that end a response with their ids, ``thinking`` = who opens it, ``hooks`` =
    site kind → calls, ``expected_calls``, ``hooks_fire`` and ``left_padding`` (the largest difference of the logits,
    and whether it is rounding only). Raises UserError if the model is not supported.
    """
    import torch
    from transformers import GenerationConfig

    from neureasoner.models import fingerprint, input_device, load
    from neureasoner.sampling import eos_ids
    from neureasoner.sites import Layout, Site, read_sites

    model, tokenizer = load(name, device or None, dtype or None, device_map or None)
    ends = eos_ids(model, tokenizer)
    layout = Layout.of(model)
    kinds = ("residual", "neuron", "head", "attn_out", "mlp_out")
    sites = [
        Site(kind, layer, (0,) if kind in ("neuron", "head") else None)
        for kind in kinds
        for layer in range(layout.n_layers)
    ]
    rows: dict[str, int] = dict.fromkeys(map(str, sites), 0)

    def count(site: str, value: torch.Tensor) -> None:
        rows[site] += value.shape[1]

    where = input_device(model)
    ids = tokenizer("One plus two is", return_tensors="pt").input_ids.to(where)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    # the prompt is read once, then every new token but the last
    expected = ids.shape[1] + NEW_TOKENS - 1
    # nothing of the folder's own settings: an unset one (a cache, chunks of the prompt) would be filled in from there
    model.generation_config = GenerationConfig()
    options = GenerationConfig(
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=fill
    )
    with torch.no_grad():
        with read_sites(model, sites, count):
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
        missing = [s for s, n in rows.items() if n != expected]
        pad = torch.full_like(ids[:, :3], fill)
        mask = torch.cat([torch.zeros_like(pad), torch.ones_like(ids)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(torch.cat([pad, ids], 1), attention_mask=mask, position_ids=positions).logits[:, -1].float()
        alone = model(ids).logits[:, -1].float()
    difference = float((padded - alone).abs().max())
    scale = float(alone.abs().max())
    # rounding: a handful of units in the last place of the dtype, relative to the largest logit
    tolerance = 32 * torch.finfo(model.dtype).eps * max(scale, 1.0)
    return {
        "model": name,
        "architecture": type(model).__name__,
        "layers": layout.n_layers,
        "hidden_size": layout.hidden_size,
        "heads": layout.n_heads,
        "kv_heads": layout.n_kv_heads,
        "head_dim": layout.head_dim,
        "neurons_per_layer": layout.intermediate_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": _devices(model, where),
        "attention": model.config._attn_implementation,
        "fingerprint": fingerprint(model),
        "ends": {tokenizer.convert_ids_to_tokens(i) or f"id {i}": i for i in ends},
        "thinking": _thinking(tokenizer),
        "hooks": {kind: sum(n for s, n in rows.items() if s.startswith(kind + ":")) for kind in kinds},
        "expected_calls": expected * layout.n_layers,
        "hooks_fire": not missing,
        "left_padding": {"difference": difference, "consistent": difference <= tolerance},
    }


def _devices(model: Any, where: Any) -> str:
    """The device, or all those over which a device map has spread the weights."""
    spread = {str(d) for d in getattr(model, "hf_device_map", {}).values()}
    return ", ".join(sorted(spread)) if len(spread) > 1 else str(where)


def _thinking(tokenizer: Any) -> str:
    """Who writes ``<think>``, as generation will take it."""
    if not tokenizer.chat_template:
        return "no chat template"
    try:
        state = thinking_state(encode_prompt(tokenizer, "One plus two?"), tokenizer)
    except UserError as e:
        return f"the chat template fails: {e}"
    said = {OPEN: "the chat template opens it", CLOSED: "the chat template closes it"}
    return said.get(state, "the model opens it, if any")


def _warnings(found: Mapping[str, Any]) -> list[str]:
    """What a user should know, each in a line."""
    told = [
        f"{name} {found['packages'][name]} was not tested with this release ({wanted} was); results may differ"
        for name, wanted in found["untested"].items()
    ]
    model = found["model"]
    if model is None:
        return told
    if not model["ends"]:
        told.append("neither tokenizer nor generation_config.json names an end token: responses end at the token limit")
    if model["thinking"] == "no chat template":
        told.append("the tokenizer has no chat template: questions are not put as it was trained to read them")
    if "template fails" in model["thinking"]:
        told.append("questions cannot be put to it: the chat template fails on a single question; correct it")
    if not model["hooks_fire"]:
        told.append("hooks do not fire on every token: probes and steering would miss what they watch")
    if not model["left_padding"]["consistent"]:
        told.append("padding on the left changes the logits: batches of unlike prompts differ from single ones")
    return told


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Print the findings and return them.

    Keys: version, python, packages, untested, devices, dtypes, attention, disk_free_gb, model, warnings.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    found: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "packages": (packages := versions()),
        "untested": untested(packages),
        **machine(),
        "disk_free_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "model": check_model(config.model, config.device, config.dtype, config.device_map) if config.model else None,
    }
    found["warnings"] = _warnings(found)
    table = Table(
        title=f"neureasoner {__version__} · python {found['python']}", title_justify="left", show_header=False
    )
    for name, version in found["packages"].items():
        absent = "[dim]absent (optional)[/dim]" if name in OPTIONAL else "[red]absent[/red]"
        range_ = found["untested"].get(name)
        table.add_row(name, f"[red]{version} (tested: {range_})[/red]" if range_ else version or absent)
    table.add_section()
    for name, about in found["devices"].items():
        table.add_row(name, f"{about}; {', '.join(found['dtypes'][name])}")
    table.add_row("attention", ", ".join(found["attention"]))
    table.add_row("disk", f"{found['disk_free_gb']} GB free here")
    if found["model"]:
        table.add_section()
        for key, value in found["model"].items():
            table.add_row(key.replace("_", " "), _shown(value))
    console = Console(highlight=False)
    console.print(table)
    for line in found["warnings"]:
        console.print(f"[red]warning:[/red] {escape(line)}")
    return found


def _shown(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, bool):
        return "[green]yes[/green]" if value else "[red]NO[/red]"
    if isinstance(value, dict):
        return ", ".join(f"{escape(safe(k))} {_shown(v)}" for k, v in value.items()) or "[red]none[/red]"
    return f"{value:.2g}" if isinstance(value, float) else escape(safe(str(value)))
