"""The best approximation of the weighted sum (Eckart & Young 1936), in the space that the updates span."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msplora_analysis.compute.linalg.core_space import Array
from msplora_analysis.compute.merging.protocol import Method, Part, Settings, space_of


def merge(parts: Sequence[Part], settings: Settings) -> tuple[Array, Array]:
    space = space_of(parts)
    core: Array = np.add.reduce([part.weight * own for part, own in zip(parts, space.cores, strict=True)])
    largest = None if settings.energy is not None else max(len(part.a) for part in parts)
    return space.factors(core, settings.rank or largest)


METHOD = Method(
    merge, "the best approximation of the weighted sum; by default of the largest rank", "Eckart & Young 1936"
)
