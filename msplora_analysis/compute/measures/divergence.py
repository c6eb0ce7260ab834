"""Distances between singular value spectra, as pure functions of arrays.

A spectrum (sigma_1 ≥ … ≥ sigma_r ≥ 0) becomes a distribution over the index k by p_k = sigma_k / sum(sigma)
(MSPLoRA, arXiv 2503.21838, eq. 9). Every function takes spectra in the last axis, normalises them itself (so
distributions pass through unchanged) and broadcasts over the axes before it. Two rules hold throughout:

- an all-zero spectrum (B = 0, the start of training) has no distribution: the result is NaN, never 0;
- spectra of unequal length raise `AnalysisError`: cut both to the same number of largest values before.
"""

import numpy as np
from numpy.typing import ArrayLike

from msplora_analysis.compute.measures.metrics import TOLERANCE, Array, normalised
from msplora_analysis.errors import AnalysisError

FLOOR = 1e-7
"""Smallest probability that `kl` works with: a zero of q under a non-zero p would make it infinite.

Singular values below the numerical rank (`TOLERANCE`) count as zeros before, so that rounding moves no value. What one
empty direction costs is set by the floor: p_k ln(1e7), about 16 p_k. `jensen_shannon` needs no floor.
"""


def normalise(sigma: ArrayLike) -> Array:
    """The distribution p_k = sigma_k / sum(sigma) of each spectrum; NaN throughout for an all-zero one.

    sigma: (..., r), non-negative. Returns (..., r). Source: arXiv 2503.21838, eq. 9.
    """
    values = np.asarray(sigma, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise AnalysisError("a spectrum needs at least one singular value")
    if (values < 0).any() or np.isinf(values).any():
        raise AnalysisError("singular values must be finite and not negative")
    return normalised(values)[1]


def kl(p: ArrayLike, q: ArrayLike) -> Array:
    """Kullback–Leibler divergence KL(p‖q) = sum_k p_k ln(p_k / q_k), in nats; 0 if and only if p = q.

    p, q: (..., r). Returns (...). Probabilities below the numerical rank are raised to `FLOOR` and the distribution
    normalised again, which keeps the result finite and non-negative. Source: arXiv 2503.21838, eq. 10.
    """
    a, b = (_floored(spectrum) for spectrum in _pair(p, q))
    # Rounding can leave a few 1e-17 below the bound; np.maximum lets NaN through.
    return np.maximum((a * np.log(a / b)).sum(axis=-1), 0.0)


def jensen_shannon(p: ArrayLike, q: ArrayLike) -> Array:
    """Jensen–Shannon divergence (KL(p‖m) + KL(q‖m)) / 2 with m = (p + q) / 2, in nats: symmetric, at most ln 2.

    p, q: (..., r). Returns (...). No floor is needed, since m > 0 wherever p or q is.
    The divergence itself: `scipy.spatial.distance.jensenshannon` is its square root.
    Source: Lin 1991, IEEE Transactions on Information Theory 37.
    """
    a, b = _pair(p, q)
    m = (a + b) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (np.where(part == 0, 0.0, part * np.log(part / m)).sum(axis=-1) for part in (a, b))
    return np.clip((first + second) / 2, 0.0, np.log(2))


def wasserstein(p: ArrayLike, q: ArrayLike) -> Array:
    """Wasserstein-1 distance over the index k: the mean number of places that probability must move.

    W_1(p, q) = sum_k |P_k − Q_k| with the cumulative sums P and Q, which is what optimal transport at cost |k − l|
    comes to in one dimension (Vallender 1974); `scipy.stats.wasserstein_distance(k, k, p, q)` is the same number.

    p, q: (..., r). Returns (...), from 0 to r − 1.
    """
    a, b = _pair(p, q)
    return np.abs(np.cumsum(a - b, axis=-1)).sum(axis=-1)


def pairwise_kl(spectra: ArrayLike) -> Array:
    """KL(i‖j) of every ordered pair of spectra at [i, j]; the diagonal is 0.

    spectra: (n, r). Returns (n, n). An all-zero spectrum makes its row and its column NaN.
    Source: arXiv 2503.21838, eq. 9, 10.
    """
    p = normalise(spectra)
    if p.ndim != 2:
        raise AnalysisError(f"pairwise_kl takes spectra of shape (n, r), not {p.shape}")
    # Row by row, so that memory stays at n × r beside the result.
    return np.array([kl(row, p) for row in p]).reshape(len(p), len(p))


def kl_matrices(spectra: Array) -> Array:
    """``pairwise_kl`` of many sets of spectra at once.

    One product for all pairs, sum p ln p - p (ln q)ᵀ, takes a tenth of the time of ``kl`` (400 sets of 24 spectra of 8
    values), and differs from it by rounding: 1e-15.

    Args:
        spectra: (..., n, r).

    Returns:
        (..., n, n), KL(i‖j) at [..., i, j], in nats; NaN in the row and the column of an all-zero spectrum.
    """
    p = _floored(normalised(spectra)[1])
    logarithm = np.log(p)
    entropy = (p * logarithm).sum(axis=-1)
    return np.maximum(entropy[..., :, None] - p @ np.swapaxes(logarithm, -1, -2), 0.0)


def js_matrices(spectra: Array) -> Array:
    """``jensen_shannon`` of every two spectra of many sets: (..., n, r) to (..., n, n), symmetric."""
    p = normalised(spectra)[1]
    rows = [jensen_shannon(p[..., i, None, :], p) for i in range(p.shape[-2])]
    return np.stack(rows, axis=-2)


def _floored(p: Array) -> Array:
    """Distributions without zeros, so that every ratio of them is finite."""
    known = ~(p <= TOLERANCE * p.max(axis=-1, keepdims=True, initial=0))  # NaN stays
    return normalised(np.where(known, np.maximum(p, FLOOR), FLOOR))[1]


def _pair(p: ArrayLike, q: ArrayLike) -> tuple[Array, Array]:
    """Both as distributions over the same k."""
    a, b = normalise(p), normalise(q)
    if a.shape[-1] != b.shape[-1]:
        raise AnalysisError(
            f"spectra of {a.shape[-1]} and {b.shape[-1]} values cannot be compared as they are: "
            "compare the same number of largest values of each"
        )
    return a, b
