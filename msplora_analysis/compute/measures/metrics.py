"""Measures of a spectrum, as functions of arrays.

Every function takes ``sigma`` of shape (..., r): singular values in descending order along the last
axis, zeros allowed (padding with zeros changes nothing). It returns float64 of shape (...). With
p_k = sigma_k / sum(sigma), an all-zero spectrum has no p, and every ratio of it is NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from msplora_analysis.compute.measures.registry import Measure

Array = NDArray[np.float64]

KS = (1, 2, 4)  # M_eff-k is always given for these

TOLERANCE = 1e-6
"""A singular value below this share of the largest is zero for the numerical rank: its direction says nothing.

Ten times the accuracy promised of small singular values.
"""

_NORMS = "Golub & Van Loan, Matrix Computations, § 2.3 and 2.4"


@Measure(
    "sigma_1",
    label="largest singular value",
    symbol="σ₁",
    axis=r"$\sigma_1$",
    formula=r"\lVert \Delta W \rVert_2 = \sigma_1",
    source=_NORMS,
    high="large",
    shown=("metrics", "report", "matrices"),
    cut=lambda sigma, norm: sigma[:, 0],
)
def sigma_1(sigma: ArrayLike) -> Array:
    """Spectral norm of the matrix."""
    return np.asarray(sigma, dtype=np.float64)[..., 0]


@Measure(
    "frobenius",
    label="Frobenius norm",
    symbol="norm",
    formula=r"\lVert \Delta W \rVert_F = \sqrt{\textstyle\sum_k \sigma_k^2}",
    source=_NORMS,
    high="large",
    shown=("metrics", "report", "matrices", "watch", "live"),
    cut=lambda sigma, norm: norm,
)
def frobenius(sigma: ArrayLike) -> Array:
    """Frobenius norm of the matrix: sqrt(sum_k sigma_k²)."""
    sigma = np.asarray(sigma, dtype=np.float64)
    largest = sigma[..., :1]
    scaled = np.divide(sigma, largest, out=np.zeros_like(sigma), where=largest > 0)
    return largest[..., 0] * np.sqrt((scaled**2).sum(axis=-1))  # squares stay in range


@Measure(
    "nuclear",
    label="nuclear norm",
    formula=r"\lVert \Delta W \rVert_* = \textstyle\sum_k \sigma_k",
    source=_NORMS,
    high="large",
)
def nuclear(sigma: ArrayLike) -> Array:
    """Nuclear norm of the matrix: sum_k sigma_k."""
    return np.asarray(sigma, dtype=np.float64).sum(axis=-1)


@Measure(
    "stable_rank",
    label="stable rank",
    formula=r"\operatorname{srank} = \frac{\lVert \Delta W \rVert_F^2}{\lVert \Delta W \rVert_2^2}"
    r" = \frac{\sum_k \sigma_k^2}{\sigma_1^2}",
    source="Rudelson & Vershynin 2007, Sampling from large matrices, J. ACM 54",
    high="broad",
    unit="directions",
    shown=("metrics", "report", "matrices"),
    cut=lambda sigma, norm: (norm / sigma[:, 0]) ** 2,
)
def stable_rank(sigma: ArrayLike) -> Array:
    """sum_k sigma_k² / sigma_1², from 1 to r (Rudelson & Vershynin 2007)."""
    scaled, _ = normalised(sigma)
    return (scaled**2).sum(axis=-1)


@Measure(
    "effective_rank",
    label="effective rank",
    formula=r"\operatorname{erank} = \exp\left(-\sum_k p_k \ln p_k\right)",
    source="Roy & Vetterli 2007, The effective rank (EUSIPCO)",
    high="broad",
    unit="directions",
    shown=("metrics", "report", "matrices", "watch", "live"),
)
def effective_rank(sigma: ArrayLike) -> Array:
    """exp(-sum_k p_k ln p_k), from 1 to r (Roy & Vetterli 2007, EUSIPCO)."""
    _, p = normalised(sigma)
    logarithm = np.log(np.where(p > 0, p, 1))  # 0 ln 0 = 0
    return np.exp(-(p * logarithm).sum(axis=-1))


@Measure(
    "participation_ratio",
    label="participation ratio",
    formula=r"\operatorname{PR} = \frac{\left(\sum_k \sigma_k^2\right)^2}{\sum_k \sigma_k^4}",
    source="Bell & Dean 1970, Discuss. Faraday Soc. 50, of the squares σ²",
    high="broad",
    unit="directions",
)
def participation_ratio(sigma: ArrayLike) -> Array:
    """(sum_k sigma_k²)² / sum_k sigma_k⁴, from 1 to r (Bell & Dean 1970, on eigenvalues sigma²)."""
    scaled, _ = normalised(sigma)
    return (scaled**2).sum(axis=-1) ** 2 / (scaled**4).sum(axis=-1)


@Measure(
    "m_eff_{k}",
    label="M_eff-{k}",
    axis=r"$M_\mathrm{eff}$-{k}",
    formula=r"M_{\text{eff-}k} = \sum_{i \le k} p_i",
    source="MSPLoRA, [arXiv 2503.21838](https://arxiv.org/abs/2503.21838), eq. 8",
    high="concentrated",
    shown={"metrics": KS, "report": (1,), "matrices": (1,), "live": (1, 4)},
    parameter="k",
)
def m_eff(sigma: ArrayLike, k: int) -> Array:
    """M_eff-k = sum_{i <= k} p_i (MSPLoRA, arXiv 2503.21838, eq. 8), in (0, 1].

    The share of the k largest singular values. High means concentrated, that is *low* complexity:
    the opposite sense of ``effective_rank``. 1 if k is at least the length.
    """
    _, p = normalised(sigma)
    return p[..., :k].sum(axis=-1) / p.sum(axis=-1)  # the quotient makes a full sum exactly 1


def normalised(sigma: ArrayLike) -> tuple[Array, Array]:
    """sigma_k / sigma_1 and p_k, in any order; NaN throughout for an all-zero spectrum.

    Dividing by the largest first keeps the sum of huge or subnormal values in range.
    """
    sigma = np.asarray(sigma, dtype=np.float64)
    largest = sigma.max(axis=-1, keepdims=True)
    scaled = np.divide(sigma, largest, out=np.full_like(sigma, np.nan), where=largest > 0)
    return scaled, scaled / scaled.sum(axis=-1, keepdims=True)
