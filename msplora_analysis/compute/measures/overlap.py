"""How much two weight updates share, as pure functions of arrays.

Directions are rows: arrays (..., K, d) whose rows are orthonormal, or zero beyond the rank. All measures come from
their inner products X = U_i U_jᵀ, so that of n updates one matrix product gives all pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating[Any]]


def inner_products(x: Array, y: Array) -> Array:
    """Inner products of the directions of every pair, by one matrix product.

    x: (n, K, d), y: (m, L, d). Returns (n, m, K, L), a view.
    """
    n, k, d = x.shape
    m, other, _ = y.shape
    product: Array = x.reshape(n * k, d) @ y.reshape(m * other, d).T
    return product.reshape(n, k, m, other).transpose(0, 2, 1, 3)


def subspace_overlap(inner: Array, k: ArrayLike) -> Array:
    """‖U_i U_jᵀ‖_F² / k of the first k directions of each: from 0 (orthogonal) to 1 (the same subspace).

    inner: (..., K, L), inner products of orthonormal directions, by descending singular value. k: (...), for each pair.
    Returns (...); NaN where k is 0. Source: Hu et al. 2021, arXiv 2106.09685, §7.2 and eq. 4, φ with i = j = k.
    """
    k = np.asarray(k)
    top = int(k.max(initial=0))
    inner = inner[..., :top, :top]
    if (k == top).all():
        total = np.einsum("...ab,...ab->...", inner, inner)
    else:
        first = (np.arange(inner.shape[-2]) < k[..., None]).astype(inner.dtype)
        second = (np.arange(inner.shape[-1]) < k[..., None]).astype(inner.dtype)
        total = np.einsum("...ab,...ab,...a,...b->...", inner, inner, first, second)
    with np.errstate(invalid="ignore", divide="ignore"):
        overlap: Array = np.where(k > 0, total / k, np.nan)
    return np.minimum(overlap, 1.0)


def expected_overlap(k: ArrayLike, d: ArrayLike) -> Array:
    """Mean overlap of two random k-dimensional subspaces of R^d: k / d; NaN for k = 0."""
    k, d = np.asarray(k, dtype=np.float64), np.asarray(d, dtype=np.float64)
    return np.where(k > 0, k / d, np.nan)


def overlap_deviation(k: ArrayLike, d: ArrayLike) -> Array:
    """Standard deviation of the overlap of two random k-dimensional subspaces of R^d; NaN for k = 0.

    With the projections P and Q on them, the overlap is tr(P Q) / k, and tr(P Q) - k²/d = tr(P' Q') for the traceless
    parts P' = P - (k/d) I, Q'. Under random rotation Q' is isotropic in the traceless symmetric matrices (on which the
    orthogonal group acts irreducibly), a space of (d - 1)(d + 2) / 2 dimensions, and ‖P'‖² = ‖Q'‖² = k (d - k) / d:

        var tr(P Q) = 2 k² (d - k)² / (d² (d - 1)(d + 2)),

    which for k = 1 is that of a squared cosine, Beta(1/2, (d - 1)/2). About √2 / d for small k.
    """
    k, d = np.asarray(k, dtype=np.float64), np.asarray(d, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = np.sqrt(2 / ((d - 1) * (d + 2))) * (d - k) / d
    return np.where(k <= 0, np.nan, np.where(d > 1, deviation, 0.0))


def update_cosine(inner_out: Array, inner_in: Array, sigma_i: Array, sigma_j: Array) -> Array:
    """<ΔW_i, ΔW_j> / (‖ΔW_i‖ ‖ΔW_j‖), from -1 to 1, of updates ΔW = U S Vᵀ.

    The inner product is sum_kl sigma_k sigma_l (u_k · u_l)(v_k · v_l). inner_out, inner_in: (..., K, L) of left and
    right directions; sigma_i: (..., K), sigma_j: (..., L). Returns (...); NaN for an update of zero.
    """
    s, t = _unit(sigma_i), _unit(sigma_j)
    cosine: Array = np.einsum("...ab,...ab,...a,...b->...", inner_out, inner_in, s, t)
    return np.clip(cosine, -1.0, 1.0)


def _unit(sigma: Array) -> Array:
    """Each row over its norm; NaN for a row of zeros."""
    largest = sigma.max(axis=-1, keepdims=True, initial=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = sigma / largest
        unit: Array = scaled / np.linalg.norm(scaled, axis=-1, keepdims=True)
    return unit
