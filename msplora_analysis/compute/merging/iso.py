"""Iso-C: the sum with all singular values set to their mean (Marczak et al. 2025, arXiv 2502.04959).

Of dense updates the mean is over all min(rows, cols) values. A sum of LoRAs has few that are not zero, and the mean is
over these, as where the method works in core space (arXiv 2509.17786): else the result would be of full rank, in
directions that no adapter has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msplora_analysis.compute.linalg.core_space import Array
from msplora_analysis.compute.merging.protocol import Method, Part, Settings, space_of


def merge(parts: Sequence[Part], settings: Settings) -> tuple[Array, Array]:
    space = space_of(parts)
    core = sum(part.weight * own for part, own in zip(parts, space.cores, strict=True))
    u, sigma, vt = np.linalg.svd(core, full_matrices=False)
    known = sigma > max(part.a.shape[1] for part in parts) * np.finfo(np.float64).eps * sigma[0]
    level = sigma[known].mean() if known.any() else 0.0
    if settings.rank is not None:
        known[settings.rank :] = False
    root = np.sqrt(level)
    return root * (vt[known] @ space.right), space.left @ (u[:, known] * root)


METHOD = Method(merge, "the sum with all singular values at their mean", "arXiv 2502.04959")
