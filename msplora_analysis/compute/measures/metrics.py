"""Measures of a spectrum, as functions of arrays.

Every function takes ``sigma`` of shape (..., r): singular values in descending order along the last
axis, zeros allowed (padding with zeros changes nothing). It returns float64 of shape (...). With
p_k = sigma_k / sum(sigma), an all-zero spectrum has no p, and every ratio of it is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def m_eff(sigma: ArrayLike, k: int) -> Array:
    """M_eff-k = sum_{i <= k} p_i (MSPLoRA, arXiv 2503.21838, eq. 8), in (0, 1].

    The share of the k largest singular values. High means concentrated, that is *low* complexity:
    the opposite sense of ``effective_rank``. 1 if k is at least the length.
    """
    _, p = normalised(sigma)
    return p[..., :k].sum(axis=-1) / p.sum(axis=-1)  # the quotient makes a full sum exactly 1


def effective_rank(sigma: ArrayLike) -> Array:
    """exp(-sum_k p_k ln p_k), from 1 to r (Roy & Vetterli 2007, EUSIPCO)."""
    _, p = normalised(sigma)
    logarithm = np.log(np.where(p > 0, p, 1))  # 0 ln 0 = 0
    return np.exp(-(p * logarithm).sum(axis=-1))


def stable_rank(sigma: ArrayLike) -> Array:
    """sum_k sigma_k² / sigma_1², from 1 to r (Rudelson & Vershynin 2007)."""
    scaled, _ = normalised(sigma)
    return (scaled**2).sum(axis=-1)


def participation_ratio(sigma: ArrayLike) -> Array:
    """(sum_k sigma_k²)² / sum_k sigma_k⁴, from 1 to r (Bell & Dean 1970, on eigenvalues sigma²)."""
    scaled, _ = normalised(sigma)
    return (scaled**2).sum(axis=-1) ** 2 / (scaled**4).sum(axis=-1)


def frobenius(sigma: ArrayLike) -> Array:
    """Frobenius norm of the matrix: sqrt(sum_k sigma_k²)."""
    sigma = np.asarray(sigma, dtype=np.float64)
    largest = sigma[..., :1]
    scaled = np.divide(sigma, largest, out=np.zeros_like(sigma), where=largest > 0)
    return largest[..., 0] * np.sqrt((scaled**2).sum(axis=-1))  # squares stay in range


def nuclear(sigma: ArrayLike) -> Array:
    """Nuclear norm of the matrix: sum_k sigma_k."""
    return np.asarray(sigma, dtype=np.float64).sum(axis=-1)


MEASURES: dict[str, Callable[[ArrayLike], Array]] = {
    "frobenius": frobenius,
    "nuclear": nuclear,
    "stable_rank": stable_rank,
    "effective_rank": effective_rank,
    "participation_ratio": participation_ratio,
}
"""The columns of the metrics table that are a function of the singular values alone."""


def normalised(sigma: ArrayLike) -> tuple[Array, Array]:
    """sigma_k / sigma_1 and p_k, in any order; NaN throughout for an all-zero spectrum.

    Dividing by the largest first keeps the sum of huge or subnormal values in range.
    """
    sigma = np.asarray(sigma, dtype=np.float64)
    largest = sigma.max(axis=-1, keepdims=True)
    scaled = np.divide(sigma, largest, out=np.full_like(sigma, np.nan), where=largest > 0)
    return scaled, scaled / scaled.sum(axis=-1, keepdims=True)
