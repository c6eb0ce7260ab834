"""How many singular values hold most of an update: evidence of the rank it used, not proof of the rank it needs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from msplora_analysis.compute.measures.metrics import normalised
from msplora_analysis.compute.measures.registry import Measure

SHARE = 0.99


@Measure(
    "rank_needed_{percent}",
    label="directions for {percent} % of Σσ²",
    symbol="k{percent}",
    axis="directions needed",
    formula=r"\min \left\{ k : \sum_{i \le k} \sigma_i^2 \ge s \sum_i \sigma_i^2 \right\}",
    source="Eckart & Young 1936, Psychometrika 1",
    high="broad",
    unit="directions",
    shown={"matrices": (90, 99)},
    parameter="percent",
)
def rank_needed(sigma: ArrayLike, percent: int) -> NDArray[np.float64]:
    """``energy_rank`` for a share in percent."""
    return energy_rank(sigma, percent / 100)


def energy_rank(sigma: ArrayLike, share: float = SHARE) -> NDArray[np.float64]:
    """The least k for which the k largest sigma² are at least ``share`` of their sum; NaN for an all-zero spectrum.

    sigma: (..., r), descending. Returns (...). The best approximation of rank k loses the rest in
    squared Frobenius norm (Eckart & Young 1936).
    """
    scaled, _ = normalised(sigma)
    energy = np.cumsum(scaled**2, axis=-1)
    # Rounding of the sum must not ask for one direction more.
    enough = energy >= share * energy[..., -1:] * (1 - 1e-12)
    return np.where(np.isnan(energy[..., -1]), np.nan, enough.argmax(axis=-1) + 1.0)
