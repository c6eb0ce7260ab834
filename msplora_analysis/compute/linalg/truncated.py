"""The largest singular values of a large matrix, with a bound of their error.

A basis of the row space grows (``krylov``) until the Rayleigh-Ritz approximations in it are good enough.

The bound. Take A V = U S, for the k largest Ritz values S, and the residuals R = Aᵀ U - V S. In bases that start with
U and V, A is [[S, Rᵀ V⊥], [0, E]]. By Weyl's inequality the singular values of A differ from those of S and E
together by no more than ‖R‖₂; with the first i columns alone, those up to the i-th by no more than ‖R[:, :i]‖_F. By
interlacing none is below its Ritz value. What the residuals cannot show is that E has no value above S: a random
block would have to be orthogonal to that singular vector, to rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.linalg.device import CPU, library, like, to_device, to_host
from msplora_analysis.compute.linalg.krylov import krylov

Array = NDArray[np.float64]

SMALL = 1536  # up to this many rows or columns, LAPACK gives all singular values about as fast
TOP_K = 64  # how many of a larger matrix, unless asked for another number

_OVERSAMPLING = 8  # columns of a block beyond k, against values that lie close behind the k-th
_EPS = float(np.finfo(np.float64).eps)


class Spectrum(NamedTuple):
    """Singular values, descending, float64; and the Frobenius norm where they are not all of the matrix's."""

    sigma: NDArray[np.floating[Any]]
    frobenius: float | None = None


class Largest(NamedTuple):
    """The k largest singular values (k,) of a matrix, descending, and bounds of their errors (k,).

    left: (rows, k), and right: (cols, k), singular vectors; empty where they cost and are not wanted.
    """

    sigma: Array
    bound: Array
    left: Array
    right: Array


def matrix_spectrum(matrix: Array, top_k: int | None = None, device: str = CPU) -> Spectrum:
    """All singular values of a matrix with SMALL rows or columns or fewer, the TOP_K largest of another.

    matrix: (rows, cols), float64, finite. top_k: how many, at most. device: where it is computed.
    """
    small = min(matrix.shape)
    k = min(small, top_k or (small if small <= SMALL else TOP_K))
    sigma = largest(to_device(matrix, device), k).sigma
    if k == small:
        return Spectrum(sigma)
    scale = float(np.abs(matrix).max(initial=0))
    return Spectrum(sigma, scale * float(np.linalg.norm(matrix / scale)) if scale else 0.0)


def largest(matrix: Any, k: int, tolerance: float = 1e-5, *, vectors: bool = False) -> Largest:
    """The k largest singular values.

    matrix: (rows, cols), float64, finite, of numpy or torch. Each bound is at most ``tolerance`` times its value, or
    times a hundredth of the largest. The same matrix gives the same values.
    """
    if matrix.shape[0] < matrix.shape[1]:
        sigma, bound, right, left = largest(matrix.T, k, tolerance, vectors=vectors)
        return Largest(sigma, bound, left, right)
    a = matrix
    scale = float(abs(a).max()) if 0 not in a.shape else 0.0
    if scale == 0:
        return Largest(np.zeros(k), np.zeros(k), np.eye(len(a), k), np.eye(a.shape[1], k))
    n = a.shape[1]
    width = k + _OVERSAMPLING
    if n <= SMALL or n <= 12 * width:  # LAPACK is about as fast
        return _dense(a, k, vectors)
    if not 1e-140 < scale < 1e140:  # squares are taken
        sigma, bound, left, right = largest(a / scale, k, tolerance, vectors=vectors)
        return Largest(sigma * scale, bound * scale, left, right)

    check = 3 * width
    for basis, projected, _ in krylov(a, width):
        held = len(projected)
        if held >= check or held + width > n:
            found = _ritz(a, basis @ like(np.linalg.eigh(projected)[1][:, -k:], a))
            if (found.bound <= tolerance * np.maximum(found.sigma, found.sigma[0] / 100)).all():
                return found
            if held + width > n // 2:
                break  # the basis nears the whole space: no cheaper
            check = held + max(2 * width, held // 4)
    return _dense(a, k, vectors)


def _dense(a: Any, k: int, vectors: bool) -> Largest:
    """LAPACK's values, and its error: rounding."""
    linalg = library(a).linalg
    if vectors:
        u, sigma, vt = map(to_host, linalg.svd(a, full_matrices=False))
        left, right = u[:, :k], vt[:k].T
    else:
        sigma = np.linalg.svd(a, compute_uv=False) if library(a) is np else to_host(linalg.svdvals(a))
        left = right = np.empty((0, 0))
    return Largest(sigma[:k], np.full(k, min(a.shape) * _EPS * float(sigma[0])), left, right)


def _ritz(a: Any, directions: Any) -> Largest:
    """Ritz values of ``a`` (m, n) in the span of ``directions`` (n, k), bounds of their errors, Ritz vectors."""
    linalg = library(a).linalg
    v = linalg.qr(directions)[0]
    u, sigma, rotation = linalg.svd(a @ v, full_matrices=False)
    right = v @ rotation.T
    residuals = a.T @ u - right * sigma
    squares = to_host((residuals**2).sum(0))
    sigma = to_host(sigma)
    # Rounding of the products themselves; far below any tolerance.
    return Largest(sigma, np.sqrt(np.cumsum(squares)) + len(v) * _EPS * sigma[0], to_host(u), to_host(right))
