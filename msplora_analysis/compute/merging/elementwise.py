"""Methods that look at single entries of the dense updates: a module at a time, its rows in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from msplora_analysis.compute.linalg.best import best
from msplora_analysis.compute.linalg.core_space import Array
from msplora_analysis.compute.merging.protocol import Part, Settings

_BLOCK = 2**24  # bytes of all updates held at once


def by_entries(parts: Sequence[Part], settings: Settings, rule: Callable[[Array], Array]) -> tuple[Array, Array]:
    """The best approximation of what a rule makes of the dense updates; by default of the sum of their ranks.

    rule: from the rows of all weighted updates, (parts, n, cols), to those of the result (n, cols).
    """
    rows, cols = len(parts[0].b), parts[0].a.shape[1]
    merged = np.empty((rows, cols))
    step = max(1, _BLOCK // (8 * len(parts) * cols))
    for start in range(0, rows, step):
        own = slice(start, start + step)
        merged[own] = rule(np.stack([part.weight * (part.b[own] @ part.a) for part in parts]))
    most = settings.rank or min(sum(len(part.a) for part in parts), rows, cols)
    found = best(merged, energy=settings.energy) if settings.energy is not None else best(merged, rank=most)
    root = np.sqrt(found.sigma)
    return root[:, None] * found.right, found.left * root


def thresholds(updates: Iterable[Array], density: float) -> Array:
    """Of each the magnitude from which on its entries are the largest share ``density`` of them."""
    found = []
    for update in updates:
        sizes = np.abs(update).ravel()
        kept = max(1, int(density * sizes.size))
        found.append(np.partition(sizes, sizes.size - kept)[sizes.size - kept])
    return np.array(found)


def trim_elect_merge(values: Array, least: Array) -> Array:
    """TIES: leave out entries below ``least``, elect a sign by the sum, take the mean of those of that sign.

    values: (n, ...), weighted. least: (n,). Source: Yadav et al. 2023, arXiv 2306.01708.
    """
    kept = np.where(np.abs(values) >= least.reshape(-1, *(1,) * (values.ndim - 1)), values, 0.0)
    agreeing = np.where(np.sign(kept) == np.sign(kept.sum(axis=0)), kept, 0.0)
    merged: Array = agreeing.sum(axis=0) / np.maximum((agreeing != 0).sum(axis=0), 1)
    return merged
