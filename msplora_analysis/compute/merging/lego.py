"""LoRA-LEGO: rank-1 units of all adapters, clustered; the centres are the result (Zhao et al. 2024, arXiv 2409.16167).

A unit is a row of A with its column of B. The factors of an update are no one's own, so units are taken in a canonical
form: its singular directions, the root of each singular value on either side, and the sign by the largest entry. The
paper's reweighting of the result is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msplora_analysis.compute.linalg.core_space import Array, balanced
from msplora_analysis.compute.merging.protocol import Method, Part, Settings, space_of
from msplora_analysis.errors import AnalysisError


def merge(parts: Sequence[Part], settings: Settings) -> tuple[Array, Array]:
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise AnalysisError("method=lego needs scikit-learn: pip install scikit-learn", "method") from None
    space, units = space_of(parts), []
    for part, core in zip(parts, space.cores, strict=True):
        a, b = balanced(part.weight * core, len(part.a))
        rows = a @ space.right
        signs = np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)])
        units.append(np.where(signs == 0, 1.0, signs)[:, None] * np.concatenate([a, b.T], axis=1))
    pool = np.concatenate(units)
    clusters = min(settings.rank or max(len(part.a) for part in parts), len(np.unique(pool, axis=0)))
    centres = KMeans(clusters, n_init=10, random_state=settings.seed).fit(pool).cluster_centers_
    q = len(space.right)
    return centres[:, :q] @ space.right, space.left @ centres[:, q:].T


METHOD = Method(merge, "rank-1 units of all, clustered; needs scikit-learn", "arXiv 2409.16167")
