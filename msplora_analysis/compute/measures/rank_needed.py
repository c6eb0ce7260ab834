"""How many singular values hold most of an update: evidence of the rank it used, not proof of the rank it needs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from msplora_analysis.compute.measures.metrics import normalised

SHARE = 0.99


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
