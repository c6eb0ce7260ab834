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

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats import Factor, Kronecker, Matrix, Sum, Update
from msplora_analysis.scratch import scratch
from msplora_analysis.tensors import FloatArray, TensorFile

Array = NDArray[np.floating[Any]]

# A row of unit norm keeps this much (squared) beside the rows before it, or the factor takes QR:
# Cholesky has then lost half of its digits.
_DEPENDENT = 1e-7
_BLOCK = 2**21  # bytes of float64 factors held at once, unless one matrix alone takes more


def adapter_spectra(file: TensorFile, matrices: Sequence[Matrix]) -> list[Array]:
    """Singular values of each matrix, descending, ``matrix.update.rank`` of them, float64.

    Reads each tensor as it is needed; memory stays at one block of factors. Raises AnalysisError
    naming the tensor that holds NaN or Inf.
    """
    result: list[Array] = [np.empty(0)] * len(matrices)
    sums: dict[int, Sum] = {}
    for i, matrix in enumerate(matrices):
        if isinstance(matrix.update, Sum):
            sums[i] = matrix.update
        else:
            result[i] = _spectrum(file, matrix.update, matrix.name)
    for block in _blocks(sums):
        updates = [sums[i] for i in block]
        sigma = _sum_spectra(file, updates)
        finite = np.isfinite(sigma).all(axis=1)
        for i, update, values, is_finite in zip(block, updates, sigma, finite, strict=True):
            if not is_finite:
                raise _not_finite(file, update, matrices[i].name)
            result[i] = values
    return result


def _spectrum(file: TensorFile, update: Update, name: str) -> Array:
    """Singular values of one update of any kind."""
    if isinstance(update, Kronecker):
        left, right = _spectrum(file, update.left, name), _spectrum(file, update.right, name)
        sigma: Array = np.sort(np.multiply.outer(left, right), axis=None)[::-1]
    elif isinstance(update, Sum):
        sigma = _sum_spectra(file, [update])[0]
    else:
        whole = np.multiply(_value(file, update.factor), update.scaling, dtype=np.float64)
        if not np.isfinite(whole).all():
            raise _not_finite(file, update, name)
        sigma = np.linalg.svd(whole, compute_uv=False)
    if not np.isfinite(sigma).all():
        raise _not_finite(file, update, name)
    return sigma


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


def _blocks(sums: Mapping[int, Sum]) -> Iterator[list[int]]:
    """Keys of sums of equal shape and ranks, as many at once as _BLOCK holds."""
    alike: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
    for i, update in sums.items():
        ranks = tuple(product.rank for product in update.products)
        alike.setdefault((update.rows, update.cols, ranks), []).append(i)
    for (rows, cols, ranks), indices in alike.items():
        size = max(1, _BLOCK // (8 * sum(ranks) * (rows + cols)))
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _sum_spectra(file: TensorFile, sums: Sequence[Sum]) -> Array:
    """Singular values (n, r) of n sums of equal shape and rank.

    The factors of a sum are concatenated; a factor that several sums share is read once.
    """
    n, first = len(sums), sums[0]
    a = _floats("A", n, first.rank, first.cols)
    b = _floats("B", n, first.rows, first.rank)
    places: dict[Factor, list[Array]] = {}
    for i, update in enumerate(sums):
        start = 0
        for product in update.products:
            stop = start + product.rank
            places.setdefault(product.a, []).append(a[i, start:stop])
            places.setdefault(product.b, []).append(b[i, :, start:stop])
            start = stop
    file.prefetch(name for factor in places for name in factor.tensors)
    for factor, targets in places.items():
        values = _value(file, factor)
        for target in targets:
            np.copyto(target, values)

    # One scaling can wait for the singular values; several decide how the products add up.
    scalings = np.array([[product.scaling for product in update.products] for update in sums])
    if scalings.shape[1] > 1:
        ranks = [product.rank for product in first.products]
        b *= np.repeat(scalings, ranks, axis=1)[:, None, :]
        return singular_values(a, b)
    with np.errstate(over="ignore"):
        sigma: Array = singular_values(a, b) * np.abs(scalings)
    return sigma


def _floats(use: str, *shape: int) -> Array:
    """A scratch array of float64, not cleared."""
    return scratch(use, 8 * math.prod(shape)).view(np.float64).reshape(shape)


def _value(file: TensorFile, factor: Factor) -> FloatArray:
    """The matrix that a factor stands for; it may be a view that the next read overwrites."""
    if factor.make is None:
        return file.read(factor.tensors[0]).reshape(factor.rows, factor.cols)
    if len(factor.tensors) == 1:
        return factor.make(file.read(factor.tensors[0]))
    return factor.make(*(file.read(name).copy() for name in factor.tensors))


def _not_finite(file: TensorFile, update: Update, name: str) -> AnalysisError:
    for factor in _factors(update):
        for tensor in factor.tensors:
            if not np.isfinite(file.read(tensor)).all():
                return AnalysisError(
                    f"{file.path}: tensor {tensor} holds NaN or Inf; the training diverged before "
                    "this was saved: leave this checkpoint out"
                )
    return AnalysisError(f"{file.path}: the singular values of {name} exceed float64")


def _factors(update: Update) -> Iterator[Factor]:
    if isinstance(update, Kronecker):
        yield from _factors(update.left)
        yield from _factors(update.right)
    elif isinstance(update, Sum):
        for product in update.products:
            yield from (product.a, product.b)
    else:
        yield update.factor
