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
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.linalg.device import CPU
from msplora_analysis.compute.linalg.truncated import Spectrum, matrix_spectrum
from msplora_analysis.errors import NotFiniteError
from msplora_analysis.files.tensors import FloatArray, TensorFile
from msplora_analysis.formats.updates import Factor, Kronecker, Matrix, Sum, Update, Whole

Array = NDArray[np.floating[Any]]

# A row of unit norm keeps this much (squared) beside the rows before it, or the factor takes QR:
# Cholesky has then lost half of its digits.
DEPENDENT = 1e-7
_SMALL_RANK = 32
_SMALL_WIDTH = 256
_BLOCK = 2**23  # bytes of float64 factors held at once, unless one matrix alone takes more; S, matrix by matrix: 6 ×


_of_thread = threading.local()


def adapter_spectra(
    file: TensorFile, matrices: Sequence[Matrix], top_k: int | None = None, device: str = CPU
) -> list[Spectrum]:
    """The spectrum of each matrix: ``matrix.update.rank`` singular values.

    top_k: how many of a whole matrix, whose largest are computed (see ``truncated``). device: where these are.

    Reads each tensor as it is needed; memory stays at one block of factors. Raises AnalysisError
    naming the tensor that holds NaN or Inf.
    """
    result: list[Spectrum] = [Spectrum(np.empty(0))] * len(matrices)
    sums: dict[int, Sum] = {}
    for i, matrix in enumerate(matrices):
        if isinstance(matrix.update, Sum):
            sums[i] = matrix.update
        elif isinstance(matrix.update, Whole):
            result[i] = _whole_spectrum(file, matrix.update, matrix.name, top_k, device)
        else:
            result[i] = Spectrum(_kronecker_sigma(file, matrix.update, matrix.name))
    for block in factor_blocks(sums):
        updates = [sums[i] for i in block]
        sigma = _sum_spectra(file, updates)
        finite = np.isfinite(sigma).all()
        for i, update, values in zip(block, updates, sigma, strict=True):
            if not finite and not np.isfinite(values).all():
                raise not_finite(file, update, matrices[i].name)
            result[i] = Spectrum(values)
    return result


def _kronecker_sigma(file: TensorFile, update: Kronecker, name: str) -> Array:
    """All products of the singular values of both sides."""
    sides = []
    for side in (update.left, update.right):
        if isinstance(side, Whole):
            sides.append(_whole_spectrum(file, side, name, side.rank).sigma)
        else:
            sides.append(_sum_spectra(file, [side])[0])
    with np.errstate(over="ignore", invalid="ignore"):
        sigma: Array = np.sort(np.multiply.outer(*sides), axis=None)[::-1]
    if not np.isfinite(sigma).all():
        raise not_finite(file, update, name)
    return sigma


def _whole_spectrum(file: TensorFile, update: Whole, name: str, top_k: int | None, device: str = CPU) -> Spectrum:
    found = matrix_spectrum(whole_matrix(file, update, name), top_k, device)
    if not np.isfinite(found.sigma).all():
        raise not_finite(file, update, name)
    return found


def singular_values(a: Array, b: Array) -> Array:
    """Singular values of ``b[i] @ a[i]`` for every i.

    a: (n, r, cols), b: (n, rows, r), float64. Returns (n, r), descending, with zeros beyond
    min(rows, cols). A matrix whose factors hold NaN or Inf, or whose sigma_1 overflows, gets NaN.
    Source: the R-SVD (Golub & Van Loan, Matrix Computations) with both factors made triangular.
    """
    rows, cols, rank = b.shape[1], a.shape[2], a.shape[1]
    with np.errstate(all="ignore"):  # what is not finite is reported as NaN
        core = reduced(a, b)
        sigma: Array = core.scaled(np.linalg.svd(core.values, compute_uv=False))
    sigma[:, min(rows, cols, rank) :] = 0
    return sigma


class Core(NamedTuple):
    """n products ``b[i] @ a[i]`` as r×r matrices of the same singular values, but for two scales each.

    values: (n, r, r), L_bᵀ W L_a, with the L's (n, r, r) of the factors' rows (columns of b) at unit norm, and W the
    diagonal ``weights`` (n, r): products of the norms over those of the scales. finite: (n,).
    """

    values: Array
    norms_a: Array
    norms_b: Array
    lower_a: Array
    lower_b: Array
    weights: Array
    finite: NDArray[np.bool_]

    def scaled(self, sigma: Array) -> Array:
        """Singular values (n, r) of the products from those of ``values``, in place; NaN for what is not finite."""
        # Where exactly dependent rows cancel, only their rounding is left: that is zero.
        rounding = 4 * sigma.shape[1] * np.finfo(np.float64).eps * self.weights.max(axis=1)
        sigma[sigma[:, 0] <= rounding] = 0
        sigma *= np.max(self.norms_a, axis=1, keepdims=True)
        sigma *= np.max(self.norms_b, axis=1, keepdims=True)
        sigma[~self.finite] = np.nan
        sigma[np.isinf(sigma)] = np.nan
        return sigma


def reduced(a: Array, b: Array) -> Core:
    """The cores of ``b[i] @ a[i]``, for arguments of ``singular_values``; to be called with numpy's errors ignored."""
    norms_a, lower_a = _triangular(a)
    norms_b, lower_b = _triangular(b.transpose(0, 2, 1))
    # Largest norms apart, so that nothing overflows or vanishes before the result does.
    scale_a, scale_b = (np.max(norms, axis=1, keepdims=True) for norms in (norms_a, norms_b))
    weights = norms_a / np.where(scale_a > 0, scale_a, 1)
    weights *= norms_b / np.where(scale_b > 0, scale_b, 1)
    values: Array = lower_b.transpose(0, 2, 1) @ (weights[:, :, None] * lower_a)
    finite = np.asarray(np.isfinite(values).all(axis=(1, 2)))
    values[~finite] = 0
    return Core(values, norms_a, norms_b, lower_a, lower_b, weights, finite)


def _gram(factor: Array) -> Array:
    """``factor[i] @ factor[i].T`` (n, r, r) of a factor (n, r, m)."""
    n, rank, length = factor.shape
    if rank > _SMALL_RANK or rank == 1:
        gram: Array = factor @ factor.transpose(0, 2, 1)
        return gram
    # In halves numpy asks for general products, not symmetric ones, which OpenBLAS was seen to do faster for small
    # matrices. Without AVX-512 it does not: the line above takes 0.5 to 0.8 of the time (of all on S: 0.95). But its
    # last digits differ from those of the tables so far.
    width = _SMALL_WIDTH if length > 4 * _SMALL_WIDTH else length
    pieces = length // width
    even = factor[:, :, : pieces * width].reshape(n, rank, pieces, width).transpose(0, 2, 1, 3)
    gram = _product_of_halves(even).sum(axis=1)
    if rest := length - pieces * width:
        gram += _product_of_halves(factor[:, :, -rest:])
    return gram


def _product_of_halves(factor: Array) -> Array:
    transposed, half = factor.swapaxes(-1, -2), factor.shape[-2] // 2
    return np.concatenate([factor[..., :half, :] @ transposed, factor[..., half:, :] @ transposed], axis=-2)


def _triangular(factor: Array) -> tuple[Array, Array]:
    """Row norms (n, r) of ``factor`` (n, r, m), and L (n, r, r) of its rows at unit norm.

    A factor that is not finite has a norm that is NaN or Inf.
    """
    gram = _gram(factor)
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    # Only here can squares have overflowed or vanished, or the factor hold NaN or Inf.
    for i in np.flatnonzero(~((norms > 1e-140) & (norms < 1e140)).all(axis=1)):
        norms[i], unit = unit_rows(factor[i])
        gram[i] = unit @ unit.T
    roots = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    roots[roots == 0] = 1
    gram /= roots[:, :, None] * roots[:, None, :]
    gram[~np.isfinite(norms).all(axis=1)] = 0  # LAPACK may fail on these

    diagonal = np.arange(gram.shape[1])
    gram[:, diagonal, diagonal] = 1  # for rows of zeros too, whose norms take them out again
    lower = _cholesky(gram)
    pivots = lower[:, diagonal, diagonal].min(axis=1) ** 2
    for i in np.flatnonzero(pivots < DEPENDENT):
        _, unit = unit_rows(factor[i])
        upper = np.asarray(np.linalg.qr(unit.T, mode="r"))
        lower[i] = 0
        lower[i, :, : len(upper)] = upper.T
    return norms, lower


def unit_rows(rows: Array) -> tuple[Array, Array]:
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


def factor_blocks(sums: Mapping[int, Sum], most: int = _BLOCK) -> Iterator[list[int]]:
    """Keys of sums of equal shape and ranks, as many at once as ``most`` bytes of float64 factors hold."""
    alike: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
    for i, update in sums.items():
        ranks = tuple(product.rank for product in update.products)
        alike.setdefault((update.rows, update.cols, ranks), []).append(i)
    for (rows, cols, ranks), indices in alike.items():
        size = max(1, most // (8 * sum(ranks) * (rows + cols)))
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _sum_spectra(file: TensorFile, sums: Sequence[Sum]) -> Array:
    """Singular values (n, r) of n sums of equal shape and rank."""
    a, b, scaling = load_factors(file, sums)
    with np.errstate(over="ignore"):
        sigma: Array = singular_values(a, b) * np.abs(scaling)[:, None]
    return sigma


def load_factors(file: TensorFile, sums: Sequence[Sum]) -> tuple[Array, Array, Array]:
    """Factors (n, r, cols) and (n, rows, r) of n sums of equal shape and ranks, and what remains to scale by (n,).

    The factors of a sum are concatenated; a factor that several sums share is read once. Both are
    overwritten by the next call.
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
        values = value(file, factor)
        for target in targets:
            np.copyto(target, values)

    # One scaling can wait for the singular values; several decide how the products add up.
    scalings = np.array([[product.scaling for product in update.products] for update in sums])
    if scalings.shape[1] == 1:
        return a, b, scalings[:, 0]
    b *= np.repeat(scalings, [product.rank for product in first.products], axis=1)[:, None, :]
    return a, b, np.ones(n)


def _floats(use: str, *shape: int) -> Array:
    """An array of float64, not cleared, in memory that the next call of this thread with the same ``use`` gives again.

    Fresh memory for every block costs the whole computation 1.6 times its CPU time on S, 1.5 on M, 1.0 on L (the cases
    of benchmarks/).
    """
    size = math.prod(shape)
    held: dict[str, Array] = _of_thread.__dict__
    if use not in held or held[use].size < size:
        held[use] = np.empty(size)
    return held[use][:size].reshape(shape)


def value(file: TensorFile, factor: Factor) -> FloatArray:
    """The matrix that a factor stands for."""
    if factor.make is None:
        return file.read(factor.tensors[0]).reshape(factor.rows, factor.cols)
    read = (file.read(name) for name in factor.tensors)
    return factor.make(*read, *(file.read_indices(name) for name in factor.indices))


def whole_matrix(file: TensorFile, update: Whole, name: str) -> NDArray[np.float64]:
    """The matrix of an update that is no product (rows, cols), float64; AnalysisError for NaN or Inf in it."""
    with np.errstate(over="ignore", invalid="ignore"):
        whole = np.multiply(value(file, update.factor), update.scaling, dtype=np.float64)
    if not np.isfinite(whole).all():
        raise not_finite(file, update, name)
    return whole


def not_finite(file: TensorFile, update: Update, name: str) -> NotFiniteError:
    """What to raise of a matrix with NaN or Inf: the error names the tensor."""
    for factor in _factors(update):
        for tensor in factor.tensors:
            if not np.isfinite(file.read(tensor)).all():
                return NotFiniteError(
                    f"{file.path}: tensor {tensor} holds NaN or Inf; the training diverged before "
                    "this was saved: leave this checkpoint out"
                )
    return NotFiniteError(f"{file.path}: the singular values of {name} exceed float64")


def _factors(update: Update) -> Iterator[Factor]:
    if isinstance(update, Kronecker):
        yield from _factors(update.left)
        yield from _factors(update.right)
    elif isinstance(update, Sum):
        for product in update.products:
            yield from (product.a, product.b)
    else:
        yield update.factor
