"""Singular values of low-rank products, without ever forming the product.

With A = L_a Q_a and B = Q_b L_bᵀ, where the Q's are orthonormal, the singular values of B A are
those of the r×r matrix L_bᵀ L_a. The L's are Cholesky factors of the Gram matrices A Aᵀ and Bᵀ B,
taken in float64 of rows scaled to unit norm. An error of the Gram matrix then acts on the *outer*
side of the product, so it is relative to every singular value, however small B A is beside A and
B; it grows as the rows become dependent. Where they are too close to dependent, L comes from a
Householder QR of the factor itself.

Promised: relative error <= 1e-5 for every sigma >= 1e-5 sigma_1, absolute error <= 1e-7 sigma_1
below that, for files in float64, float32, float16 and bfloat16. The one limit is rows that are
dependent to the last bit and cancel in B A: there sigma_1 >= 1e-8 |a_i| |b_i| is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats import Matrix
from msplora_analysis.tensors import TensorFile

Array = NDArray[np.floating[Any]]

# A row of unit norm keeps this much (squared) beside the rows before it, or the factor takes QR:
# Cholesky has then lost half of its digits.
_DEPENDENT = 1e-7
_BLOCK = 8 * 2**20  # bytes of float64 factors held at once, unless one matrix alone takes more


def adapter_spectra(file: TensorFile, matrices: Sequence[Matrix]) -> list[Array]:
    """Singular values of each matrix, descending, ``matrix.rank`` of them, float64.

    Reads each tensor as it is needed; memory stays at one block of factors. Raises AnalysisError
    naming the tensor that holds NaN or Inf.
    """
    result: list[Array] = [np.empty(0)] * len(matrices)
    for block in _blocks(matrices):
        a, b = _stack(file, [matrices[i] for i in block])
        sigma = singular_values(a, b)
        for i, values in zip(block, sigma, strict=True):
            if np.isnan(values).any():
                raise _not_finite(file, matrices[i])
            result[i] = values
    return result


def singular_values(a: Array, b: Array) -> Array:
    """Singular values of ``b[i] @ a[i]`` for every i.

    a: (n, r, cols), b: (n, rows, r), float64. Returns (n, r), descending, with zeros beyond
    min(rows, cols). A matrix whose factors hold NaN or Inf, or whose sigma_1 overflows, gets NaN.
    Source: the R-SVD (Golub & Van Loan, Matrix Computations) with both factors made triangular.
    """
    rows, cols, rank = b.shape[1], a.shape[2], a.shape[1]
    with np.errstate(all="ignore"):  # what is not finite is reported as NaN
        norms_a, lower_a = _triangular(a)
        norms_b, lower_b = _triangular(b.transpose(0, 2, 1))
        # Largest norms apart, so that nothing overflows or vanishes before the result does.
        scale_a, scale_b = (np.max(norms, axis=1, keepdims=True) for norms in (norms_a, norms_b))
        weights = norms_a / np.where(scale_a > 0, scale_a, 1)
        weights *= norms_b / np.where(scale_b > 0, scale_b, 1)
        core: Array = lower_b.transpose(0, 2, 1) @ (weights[:, :, None] * lower_a)
        finite = np.asarray(np.isfinite(core).all(axis=(1, 2)))
        core[~finite] = 0
        sigma: Array = np.linalg.svd(core, compute_uv=False)
        # Where exactly dependent rows cancel, only their rounding is left: that is zero.
        rounding = 4 * rank * np.finfo(np.float64).eps * weights.max(axis=1)
        sigma[sigma[:, 0] <= rounding] = 0
        sigma *= scale_a
        sigma *= scale_b
        sigma[~finite] = np.nan
        sigma[np.isinf(sigma)] = np.nan
    sigma[:, min(rows, cols, rank) :] = 0
    return sigma


def _triangular(factor: Array) -> tuple[Array, Array]:
    """Row norms (n, r) of ``factor`` (n, r, m), and L (n, r, r) of its rows at unit norm.

    A factor that is not finite has a norm that is NaN or Inf.
    """
    gram = factor @ factor.transpose(0, 2, 1)
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    # Only here can squares have overflowed or vanished, or the factor hold NaN or Inf.
    for i in np.flatnonzero(~((norms > 1e-140) & (norms < 1e140)).all(axis=1)):
        norms[i], unit = _unit_rows(factor[i])
        gram[i] = unit @ unit.T
    roots = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    roots[roots == 0] = 1
    gram /= roots[:, :, None] * roots[:, None, :]
    gram[~np.isfinite(norms).all(axis=1)] = 0  # LAPACK may fail on these

    diagonal = np.arange(gram.shape[1])
    gram[:, diagonal, diagonal] = 1  # for rows of zeros too, whose norms take them out again
    lower = _cholesky(gram)
    pivots = lower[:, diagonal, diagonal].min(axis=1) ** 2
    for i in np.flatnonzero(pivots < _DEPENDENT):
        _, unit = _unit_rows(factor[i])
        upper = np.asarray(np.linalg.qr(unit.T, mode="r"))
        lower[i] = 0
        lower[i, :, : len(upper)] = upper.T
    return norms, lower


def _unit_rows(rows: Array) -> tuple[Array, Array]:
    """Row norms, and the rows divided by them; a row of zeros stays. Safe from over- and underflow."""
    peaks = np.abs(rows).max(axis=1)
    unit = rows / np.where(peaks > 0, peaks, 1)[:, None]
    norms = np.linalg.norm(unit, axis=1)
    return peaks * norms, unit / np.where(norms > 0, norms, 1)[:, None]


def _cholesky(gram: Array) -> Array:
    """Lower Cholesky factors (n, r, r); zeros for a matrix that is not positive definite."""
    try:
        lower: Array = np.linalg.cholesky(gram)
        return lower
    except np.linalg.LinAlgError:  # numpy fails the whole stack for one of its matrices
        if len(gram) == 1:
            return np.zeros_like(gram)
        return np.concatenate([_cholesky(one[None]) for one in gram])


def _blocks(matrices: Sequence[Matrix]) -> Iterator[list[int]]:
    """Indices of matrices of equal shape and rank, as many at once as _BLOCK holds."""
    alike: dict[tuple[int, int, int], list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((matrix.rows, matrix.cols, matrix.rank), []).append(i)
    for (rows, cols, rank), indices in alike.items():
        size = max(1, _BLOCK // (8 * rank * (rows + cols)))
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _stack(file: TensorFile, matrices: Sequence[Matrix]) -> tuple[Array, Array]:
    """The concatenated factors of matrices of equal shape: A (n, r, cols), scaled B (n, rows, r).

    A tensor that several of them share is read once.
    """
    n, first = len(matrices), matrices[0]
    a = np.empty((n, first.rank, first.cols))
    b = np.empty((n, first.rows, first.rank))
    targets: dict[str, list[tuple[Array, float]]] = {}
    for i, matrix in enumerate(matrices):
        start = 0
        for part in matrix.parts:
            stop = start + part.rank
            targets.setdefault(part.a, []).append((a[i, start:stop], 1.0))
            targets.setdefault(part.b, []).append((b[i, :, start:stop], part.scaling))
            start = stop
    for name, places in targets.items():
        values = file.read(name)
        for target, scaling in places:
            np.multiply(values.reshape(target.shape), scaling, out=target, dtype=np.float64)
    return a, b


def _not_finite(file: TensorFile, matrix: Matrix) -> AnalysisError:
    for part in matrix.parts:
        for name in (part.a, part.b):
            if not np.isfinite(file.read(name)).all():
                return AnalysisError(
                    f"{file.path}: tensor {name} holds NaN or Inf; the training diverged before "
                    "this was saved: leave this checkpoint out"
                )
    return AnalysisError(f"{file.path}: the singular values of {matrix.name} exceed float64")
