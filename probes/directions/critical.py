"""Reasoning-critical neurons as directions: the found one, and what is left when one idea of the method is taken away.

Legend: ``K`` neurons kept, ``N`` neurons of all blocks, ``F`` of one. Values are ``S = g - b`` in raw activation,
whatever unit they were ranked in; ``info['std']`` has each neuron's deviation over all tokens.

The variants are the ablation of AdaRAS (core.md §3.7, Table 5), whose text does not say how each was made:

- ``random_neurons``: as many other neurons of the same blocks, each with the shift of a chosen one;
- ``no_mean_difference``: the chosen neurons, all shifted by the same amount (the sign is kept, and each block's norm);
- ``no_sign_filter``: the neurons with the largest ``|S|``, whether or not the two means differ in sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from neureasoner.directions import Direction
from neureasoner.probes.attribution.contrast import Contrast, columns, resampled, top
from neureasoner.probes.attribution.rcn_config import RcnConfig
from neureasoner.probes.directions.directions import sizes_of, to_direction
from neureasoner.sites import Layout, Site

MEANING = "positive = towards the activations of right traces, away from those of wrong ones"
FULL = "full"
ABOUT = {
    FULL: "the chosen neurons, each shifted by its mean difference",
    "random_neurons": "other neurons of the same blocks with the same shifts",
    "no_mean_difference": "the chosen neurons, all of a block shifted by the same amount",
    "no_sign_filter": "the largest mean differences, of whatever sign",
}


def critical_directions(
    c: Contrast, chosen: np.ndarray, control: np.ndarray, config: RcnConfig, layout: Layout, info: Mapping[str, Any]
) -> dict[str, Direction]:
    """``full`` and its variants by name. ``chosen [K]``: columns ``l * F + n``; ``control [K]``: random neurons ``n``.

    ``info``: ``model`` and ``fingerprint`` of the model, and what else is to be kept with each of them. Without the
    sign filter there is no variant ``no_sign_filter``: the full direction is it.
    """
    ones = np.ones((1, len(c.right)))
    g, b = (np.concatenate(x, axis=1)[0] for x in list(zip(*resampled(c, ones, config.pooling), strict=True))[1:])
    s = g - b
    layer, _ = np.divmod(chosen, layout.intermediate_size)
    found = {
        FULL: (chosen, s[chosen]),
        "random_neurons": (layer * layout.intermediate_size + control, s[chosen]),
        "no_mean_difference": (chosen, _levelled(s[chosen], layer)),
    }
    if config.filter_sign:
        unfiltered = replace(config, ranking="filter", filter_sign=False)
        largest = top(columns(g[None], b[None]), c.sigma, unfiltered)[0][0]
        found["no_sign_filter"] = (largest, s[largest])
    return {
        name: _direction(at, values, c.sigma, layout, ABOUT[name], info)
        for name, (at, values) in found.items()
        if np.any(values)
    }


def _levelled(s: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """The signs of ``s [K]`` times the root mean square of its block, so that each block keeps its norm."""
    blocks, of, n = np.unique(layer, return_inverse=True, return_counts=True)
    square = np.bincount(of, s**2, len(blocks)) / n
    return np.sign(s) * np.sqrt(square)[of]


def _direction(
    at: np.ndarray, values: np.ndarray, sigma: np.ndarray, layout: Layout, about: str, info: Mapping[str, Any]
) -> Direction:
    """Columns and their values as a sparse direction, indices ascending."""
    order = np.argsort(at, kind="stable")
    layer, index = np.divmod(at[order], layout.intermediate_size)
    by_site, std = {}, {}
    for block in np.unique(layer):
        of = layer == block
        site = str(Site("neuron", int(block), tuple(int(i) for i in index[of])))
        by_site[site], std[site] = values[order][of], sigma[at[order][of]].tolist()
    kept = {k: v for k, v in info.items() if k not in ("model", "fingerprint")}
    told = {"estimator": "reasoning-critical neurons", "about": about, **kept, "sizes": sizes_of(layout), "std": std}
    return to_direction(
        by_site, layout, MEANING, model=str(info["model"]), fingerprint=str(info["fingerprint"]), info=told
    )
