"""KnOTS: align the updates by one SVD, and merge what is each one's own (Stoica et al. 2024, arXiv 2410.19735).

[ΔW_1 ... ΔW_n] = U Σ [V_1 ... V_n], and the result is U Σ V with V the TIES merge of the V_i: KnOTS-TIES. The SVD is of
the small matrices of core space side by side; U, Σ and V_i are those of the dense updates, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msplora_analysis.compute.linalg.core_space import Array
from msplora_analysis.compute.merging.elementwise import thresholds, trim_elect_merge
from msplora_analysis.compute.merging.protocol import Method, Part, Settings, space_of


def merge(parts: Sequence[Part], settings: Settings) -> tuple[Array, Array]:
    space = space_of(parts)
    u, sigma, vt = np.linalg.svd(np.concatenate(space.cores, axis=1), full_matrices=False)
    known = sigma > len(sigma) * np.finfo(np.float64).eps * sigma[0]
    own = [part @ space.right for part in np.split(vt[known], len(parts), axis=1)]
    weighted = [part.weight * v for part, v in zip(parts, own, strict=True)]
    merged = trim_elect_merge(np.stack(weighted), thresholds(weighted, settings.density))
    return merged, space.left @ (u[:, known] * sigma[known])


METHOD = Method(merge, "align by one SVD of all, then TIES of each one's own part", "arXiv 2410.19735")
