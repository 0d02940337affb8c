"""``neureasoner doctor``: what is installed, what the machine can do, and whether hooks fire on each decoded token."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from typing import Any

from neureasoner import __version__
from neureasoner.floor_config import DoctorConfig

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


def check_model(name: str, device: str = "") -> dict[str, Any]:
    """Decode a few tokens with a hook of every kind in every layer, and compare a padded row with the row alone.

    Returns sizes, ``hooks`` = site kind → calls, ``expected_calls``, ``hooks_fire`` and ``left_padding`` (the largest
    difference of the logits, and whether it is rounding only). Raises UserError if the model is not supported.
    """
    import torch

    from neureasoner.models import fingerprint, load
    from neureasoner.sites import Layout, Site, read_sites

    model, tokenizer = load(name, device or None)
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

    ids = tokenizer("One plus two is", return_tensors="pt").input_ids.to(model.device)
    # the prompt is read once, then every new token but the last
    expected = ids.shape[1] + NEW_TOKENS - 1
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        with read_sites(model, sites, count):
            model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, **options)
        missing = [s for s, n in rows.items() if n != expected]
        pad = torch.full_like(ids[:, :3], tokenizer.pad_token_id)
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
        "device": str(model.device),
        "attention": model.config._attn_implementation,
        "fingerprint": fingerprint(model),
        "hooks": {kind: sum(n for s, n in rows.items() if s.startswith(kind + ":")) for kind in kinds},
        "expected_calls": expected * layout.n_layers,
        "hooks_fire": not missing,
        "left_padding": {"difference": difference, "consistent": difference <= tolerance},
    }


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Print the findings and return them: version, python, packages, devices, dtypes, attention, disk, model."""
    from rich.console import Console
    from rich.table import Table

    found: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "packages": versions(),
        **machine(),
        "disk_free_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "model": check_model(config.model, config.device) if config.model else None,
    }
    table = Table(
        title=f"neureasoner {__version__} · python {found['python']}", title_justify="left", show_header=False
    )
    for name, version in found["packages"].items():
        absent = "[dim]absent (optional)[/dim]" if name in OPTIONAL else "[red]absent[/red]"
        table.add_row(name, version or absent)
    table.add_section()
    for name, about in found["devices"].items():
        table.add_row(name, f"{about}; {', '.join(found['dtypes'][name])}")
    table.add_row("attention", ", ".join(found["attention"]))
    table.add_row("disk", f"{found['disk_free_gb']} GB free here")
    if found["model"]:
        table.add_section()
        for key, value in found["model"].items():
            table.add_row(key.replace("_", " "), _shown(value))
    Console(highlight=False).print(table)
    return found


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "[green]yes[/green]" if value else "[red]NO[/red]"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    return f"{value:.2g}" if isinstance(value, float) else str(value)
