"""``training logit-lens``: which tokens does each block's bias vector raise and lower (core.md §4.5)?

Legend: ``L`` vectors, ``D`` hidden size, ``V`` tokens of the tokenizer. The score of a token is its row of the
unembedding times the vector, **without** the final norm: what the vector adds to the logit if nothing after its block
changed it. The cosine leaves the lengths of row and vector out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neureasoner.artifacts import write_json, write_text
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.sites import Layout, Site
from neureasoner.stages import StageFolder
from neureasoner.training.bias_config import LogitLensConfig

MEASURES = ("dot", "cosine")
SIGNS = ("raised", "lowered")


def token_scores(vectors: Any, unembedding: Any) -> tuple[Any, Any]:
    """``vectors [L, D]``, ``unembedding [V, D]`` -> dot products and cosines, each float32 ``[L, V]``.

    A vector or row of zeros has cosine 0 with everything.
    """
    vectors, rows = vectors.float(), unembedding.detach().to("cpu").float()
    dot = vectors @ rows.T
    lengths = vectors.norm(dim=1)[:, None] * rows.norm(dim=1)[None]
    return dot, (dot / lengths).where(lengths > 0, dot.new_zeros(()))


def _entries(tokenizer: Any, scores: Any, top: int) -> dict[str, list[dict[str, Any]]]:
    """``scores [V]`` -> the tokens with the largest scores and with the smallest, strongest first."""
    picked = {}
    for sign, largest in zip(SIGNS, (True, False), strict=True):
        values, ids = scores.topk(min(top, len(scores)), largest=largest)
        picked[sign] = [
            {"id": i, "token": tokenizer.decode([i]), "value": round(v, 6)}
            for i, v in zip(ids.tolist(), values.tolist(), strict=True)
        ]
    return picked


def lens(direction: Any, model: Any, tokenizer: Any, top: int) -> list[dict[str, Any]]:
    """One record a block: ``block``, ``norm``, and by measure and sign the ``top`` tokens with their values.

    Rows of the unembedding beyond the tokenizer are no tokens and are left out. Raises UserError for a direction of
    another model or with a site that is not residual.
    """
    import torch

    direction.check(model)
    blocks = []
    for name in direction.sites:
        site = Site.parse(name)
        if site.kind != "residual" or site.layer is None:
            raise UserError(f"direction '{direction.meaning}': site '{name}' is no residual:LAYER, so no bias vector")
        blocks.append(site.layer)
    order = sorted(range(len(blocks)), key=lambda i: blocks[i])
    vectors = torch.stack([direction.values[direction.sites[i]] for i in order])
    unembedding: Any = Layout.of(model).lm_head.weight
    unembedding = unembedding[: len(tokenizer)]
    scores = dict(zip(MEASURES, token_scores(vectors, unembedding), strict=True))
    return [
        {
            "block": blocks[i],
            "norm": round(float(vectors[row].norm()), 6),
            **{measure: _entries(tokenizer, scores[measure][row], top) for measure in MEASURES},
        }
        for row, i in enumerate(order)
    ]


def visible(token: str) -> str:
    """A token with its spaces and line breaks shown, other than Latin characters escaped."""
    text = token.replace(" ", "␣").replace("\n", "⏎")
    return "".join(c if c in "␣⏎" or " " <= c <= "ÿ" else ascii(c)[1:-1] for c in text)


def markdown(records: Sequence[dict[str, Any]], shown: int) -> str:
    """The tokens by cosine as a table, and by dot product as another."""
    parts = []
    for measure in reversed(MEASURES):
        parts += [f"By {measure}:", "", "| block | norm | raised | lowered |", "|---|---|---|---|"]
        for r in records:
            cells = [" ".join(f"`{visible(e['token'])}`" for e in r[measure][sign][:shown]) for sign in SIGNS]
            parts.append(
                f"| {r['block']} | {r['norm']:.3f} | " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
            )
        parts.append("")
    return "\n".join(parts)


def plot(records: Sequence[dict[str, Any]], shown: int, path: Path) -> None:
    """Two grids, raised and lowered: block by rank, the token written into its cell, coloured by cosine."""
    import numpy as np
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(2.2 + 2 * 0.95 * shown, 1.3 + 0.34 * len(records)), layout="constrained")
    values = {s: np.array([[e["value"] for e in r["cosine"][s][:shown]] for r in records]) for s in SIGNS}
    limit = max(float(np.abs(v).max()) for v in values.values()) or 1.0
    axes = [figure.add_subplot(1, 2, i + 1) for i in range(2)]
    for axis, sign in zip(axes, SIGNS, strict=True):
        image = axis.imshow(values[sign], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for y, record in enumerate(records):
            for x, entry in enumerate(record["cosine"][sign][:shown]):
                dark = abs(entry["value"]) > 0.65 * limit
                axis.text(
                    x,
                    y,
                    visible(entry["token"])[:12],
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                    parse_math=False,
                )
        axis.set(xticks=range(shown), xticklabels=range(1, shown + 1), xlabel="rank", title=f"tokens {sign}")
        axis.set(yticks=range(len(records)), yticklabels=[r["block"] for r in records])
    axes[0].set_ylabel("block")
    figure.colorbar(image, ax=axes, label="cosine with the vector", pad=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def logit_lens(config: LogitLensConfig) -> dict[str, Any]:
    """Stage ``training logit-lens``. Writes tokens.json, tokens.md and tokens.png."""
    from neureasoner.directions import INFO_FILE, TENSORS_FILE, Direction
    from neureasoner.models import load

    files = [Path(config.direction) / name for name in (INFO_FILE, TENSORS_FILE)]
    folder = StageFolder(config.out, "training logit-lens", config, inputs=[*files, *model_files(config.model)])
    if folder.done:
        return folder.summary
    model, tokenizer = load(config.model, device="cpu")
    direction = Direction.load(config.direction)
    records = lens(direction, model, tokenizer, config.top)
    write_json(folder.path / "tokens.json", {"meaning": direction.meaning, "blocks": records})
    write_text(folder.path / "tokens.md", markdown(records, config.shown))
    plot(records, config.shown, folder.path / "tokens.png")
    last = records[-1]
    summary = folder.finish(
        {
            "blocks": len(records),
            "norms": {str(r["block"]): r["norm"] for r in records},
            "last_raised": [e["token"] for e in last["cosine"]["raised"][: config.shown]],
            "last_lowered": [e["token"] for e in last["cosine"]["lowered"][: config.shown]],
        }
    )
    print(markdown(records, config.shown))
    return summary
