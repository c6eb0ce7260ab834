"""TSV-Merge: the singular vectors of all, made orthogonal (Gargiulo et al. 2024, arXiv 2412.00081).

Of each of n updates the first singular triples are kept: all of a LoRA, or rank / n of each where a rank is given. The
left vectors side by side, and the right ones, are replaced by the nearest orthonormal ones: U = P D Q gives P Q.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msplora_analysis.compute.linalg.core_space import Array
from msplora_analysis.compute.merging.protocol import Method, Part, Settings, space_of


def merge(parts: Sequence[Part], settings: Settings) -> tuple[Array, Array]:
    space = space_of(parts)
    left, sigma, right = [], [], []
    for part, core in zip(parts, space.cores, strict=True):
        u, s, vt = np.linalg.svd(core, full_matrices=False)
        k = min(len(part.a), len(s))
        if settings.rank is not None:
            k = min(k, max(1, settings.rank // len(parts)))
        left.append(u[:, :k])
        sigma.append(part.weight * s[:k])
        right.append(vt[:k].T)
    u, v = (_nearest_orthonormal(np.concatenate(side, axis=1)) for side in (left, right))
    return v.T @ space.right, space.left @ (u * np.concatenate(sigma))


def _nearest_orthonormal(columns: Array) -> Array:
    p, _, q = np.linalg.svd(columns, full_matrices=False)
    found: Array = p @ q
    return found


METHOD = Method(merge, "the singular vectors of all, made orthogonal", "arXiv 2412.00081")
