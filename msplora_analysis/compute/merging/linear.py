"""The weighted sums of the A's and of the B's, as PEFT has it: not the sum of the updates, for it mixes them.

With w the weight and s the scaling, A = sum of √(w s) A_i and B = sum of √(w s) B_i. It depends on the factors, and not
on the updates alone: it takes adapters of one rank, best of one start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msplora_analysis.compute.linalg.core_space import Array
from msplora_analysis.compute.merging.protocol import Method, Part, Settings
from msplora_analysis.errors import AnalysisError


def merge(parts: Sequence[Part], settings: Settings) -> tuple[Array, Array]:
    ranks = sorted({len(part.a) for part in parts})
    if len(ranks) > 1:
        raise AnalysisError(f"method=linear: expected adapters of one rank, found {ranks}; svd takes any", "method")
    if any(part.weight < 0 or (part.scaling <= 0).any() for part in parts):
        raise AnalysisError("method=linear: expected weights and scalings above 0; svd takes any", "method", "weights")
    a = sum(np.sqrt(part.weight * part.scaling)[:, None] * part.a for part in parts)
    return a, sum(part.b * np.sqrt(part.weight / part.scaling) for part in parts)


METHOD = Method(merge, "the weighted sums of the factors, which mixes the updates", "PEFT's combination_type=linear")
