"""DARE of the dense updates: drop entries at random, rescale the others, add up (Yu et al. 2023, arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msplora_analysis.compute.linalg.core_space import Array
from msplora_analysis.compute.merging.elementwise import by_entries
from msplora_analysis.compute.merging.protocol import Method, Part, Settings


def merge(parts: Sequence[Part], settings: Settings) -> tuple[Array, Array]:
    rng = np.random.default_rng(settings.seed)

    def rule(values: Array) -> Array:
        summed: Array = np.where(rng.random(values.shape) < settings.density, values, 0.0).sum(axis=0)
        return summed / settings.density

    return by_entries(parts, settings, rule)


METHOD = Method(merge, "drop entries at random, rescale, add up; of dense updates", "arXiv 2311.03099", cuts=True)
