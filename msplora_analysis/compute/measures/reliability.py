"""An overlap between layers, beside what the same layer of another seed has: as a pure function of numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from msplora_analysis.compute.measures.overlap import Array


def normalised_overlap(within: ArrayLike, across: ArrayLike, same: ArrayLike, chance: ArrayLike) -> Array:
    """(within − across) / (same − chance): what layers share because they were trained together.

    Two layers of one run overlap more than chance for two reasons: their inputs are alike, whatever the seed, and they
    were trained together. The first is there between runs of two seeds too, and is taken off. No pair of layers can
    be expected to share more than one layer with itself, trained again: that is the scale.

    Args:
        within: Overlap of two layers of one run.
        across: Of the same two layers, each of another run.
        same: Of one layer in two runs.
        chance: Of random directions.

    Returns:
        About 0 where layers learn nothing together, 1 where two layers of a run are as alike as one layer of two; NaN
        where one layer of two runs is not above chance.

    Example:
        >>> normalised_overlap(0.042, 0.034, 0.050, 0.021).round(2)
        0.28
    """
    inside, outside, one, none = (np.asarray(x, dtype=np.float64) for x in (within, across, same, chance))
    excess, scale = inside - outside, one - none
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, excess / scale, np.nan)[()]
