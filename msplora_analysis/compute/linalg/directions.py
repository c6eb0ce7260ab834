"""Singular directions of weight updates, from their factors.

With A = W_a L_a Q_a and B = Q_b L_bᵀ W_b as in the module ``spectra`` (L of the factor's rows at unit norm, W their
norms) and U S Vᵀ the SVD of the r×r core, the right singular vectors of B A are Vᵀ Q_a = Vᵀ L_a⁻¹ W_a⁻¹ A, the left
ones B W_b⁻¹ L_b⁻ᵀ U: two more products with the factors. Where the rows of a factor are too close to dependent for its
Cholesky factor, Q comes from the Householder QR that ``spectra`` takes there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.linalg import truncated
from msplora_analysis.compute.linalg.spectra import (
    DEPENDENT,
    Array,
    factor_blocks,
    load_factors,
    not_finite,
    reduced,
    unit_rows,
    whole_matrix,
)
from msplora_analysis.compute.measures.metrics import TOLERANCE
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.updates import Kronecker, Matrix, Sum, Whole
from msplora_core import moments as core


class Directions(NamedTuple):
    """Singular directions of n updates of one shape, padded with zeros to the largest number R of them.

    sigma: (n, R), all singular values known, descending. lengths: (n,), how many that are. rank: (n,), how many of
    them exceed TOLERANCE sigma_1. left: (n, R, rows) and right: (n, R, cols), a direction a row, zeros beyond the
    rank, both in float32, which is exact enough for inner products (1e-6) at half the cost. complete: (n,), whether
    the update is the sum of these directions, rather than only its largest part. task_in and task_out: (n, R, R), an
    orthonormal basis of the task directions on either side, a direction a row, in terms of ``right`` and ``left``: its
    first k span what the first k task directions do; None without moments.
    """

    sigma: Array
    lengths: NDArray[np.int_]
    rank: NDArray[np.int_]
    left: Array
    right: Array
    complete: NDArray[np.bool_]
    task_in: Array | None = None
    task_out: Array | None = None

    def part(self, which: slice) -> Directions:
        """Those of some of the updates."""
        return Directions(*(None if field is None else field[which] for field in self))  # type: ignore[arg-type]


def singular_directions(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Singular values (n, r), left (n, r, rows) and right (n, r, cols) singular vectors of ``b[i] @ a[i]``.

    a: (n, r, cols), b: (n, rows, r), float64. Vectors are rows; those of singular values that are zero, or zero but for
    rounding, are not orthonormal. A product that is not finite has NaN for singular values.
    """
    with np.errstate(all="ignore"):
        core = reduced(a, b)
        u, sigma, vt = np.linalg.svd(core.values)
        right = _orthonormal_rows(a, core.norms_a, core.lower_a, vt)
        left = _orthonormal_rows(b.transpose(0, 2, 1), core.norms_b, core.lower_b, u.transpose(0, 2, 1))
        sigma = core.scaled(sigma)
    sigma[:, min(b.shape[1], a.shape[2]) :] = 0
    return sigma, left, right


def directions(
    file: TensorFile,
    matrices: Sequence[Matrix],
    top_k: int | None = None,
    task: Mapping[Matrix, core.Directions] | None = None,
    *,
    dtype: type[np.floating[Any]] = np.float32,
) -> Directions:
    """The singular directions of updates of one shape.

    top_k: how many of a whole matrix that is too large for all; of a product of factors they are always all. task: the
    task directions of updates, in terms of their factors. dtype: of ``left`` and ``right``.

    Raises AnalysisError naming the tensor that holds NaN or Inf.
    """
    rows, cols = matrices[0].update.rows, matrices[0].update.cols
    limits = [held(matrix, top_k) for matrix in matrices]
    n, most = len(matrices), max(limits)
    result = Directions(
        np.zeros((n, most)),
        np.array(limits),
        np.zeros(n, dtype=int),
        np.zeros((n, most, rows), dtype),
        np.zeros((n, most, cols), dtype),
        np.array([limit == matrix.update.rank for matrix, limit in zip(matrices, limits, strict=True)]),
        *((np.zeros((n, most, most)), np.zeros((n, most, most))) if task is not None else ()),
    )
    sums = {i: matrix.update for i, matrix in enumerate(matrices) if isinstance(matrix.update, Sum)}
    for block in factor_blocks(sums):
        a, b, scaling = load_factors(file, [sums[i] for i in block])
        sigma, left, right = singular_directions(a, b)
        sigma *= np.abs(scaling)[:, None]
        left *= np.sign(scaling)[:, None, None]
        for i, found in zip(block, zip(sigma, left, right, strict=True), strict=True):
            _keep(file, matrices[i], result, i, *found)
        for at, i in enumerate(block):
            if task is not None and matrices[i] in task:
                _keep_task(result, i, a[at] @ right[at].T, b[at].T @ left[at].T, task[matrices[i]])
    for i, matrix in enumerate(matrices):
        if i not in sums:
            _keep(file, matrix, result, i, *_of_other(file, matrix, limits[i]))
    return result


def held(matrix: Matrix, top_k: int | None = None) -> int:
    """How many directions of an update ``directions`` gives."""
    update = matrix.update
    if isinstance(update, Sum) or min(update.rows, update.cols) <= truncated.SMALL:
        return update.rank
    return min(update.rank, top_k or truncated.TOP_K)


def _keep(
    file: TensorFile, matrix: Matrix, result: Directions, i: int, sigma: Array, left: Array, right: Array
) -> None:
    if not np.isfinite(sigma).all():
        raise not_finite(file, matrix.update, matrix.name)
    rank = int(np.count_nonzero(sigma > TOLERANCE * sigma[0]))
    result.sigma[i, : len(sigma)] = sigma
    result.rank[i] = rank
    result.left[i, :rank] = left[:rank]
    result.right[i, :rank] = right[:rank]


def _keep_task(result: Directions, i: int, of_a: Array, of_b: Array, task: core.Directions) -> None:
    """of_a: (r, r), the rows of A in terms of right singular directions; of_b: the columns of B, of left ones."""
    assert result.task_in is not None
    assert result.task_out is not None
    rank = result.rank[i]
    for basis, terms in ((result.task_in, task.right @ of_a), (result.task_out, task.left.T @ of_b)):
        q = np.linalg.qr(terms[:, :rank].T)[0]  # (rank, least of rank and r)
        basis[i, : q.shape[1], :rank] = q.T


def _orthonormal_rows(factor: Array, norms: Array, lower: Array, rotation: Array) -> Array:
    """``rotation @ Q`` for the orthonormal rows Q of ``factor`` (n, r, m) = norms * lower @ Q."""
    diagonal = np.diagonal(lower, axis1=1, axis2=2)
    cholesky = np.asarray(((diagonal > 0) & (diagonal**2 >= DEPENDENT)).all(axis=1))
    triangle = np.where(cholesky[:, None, None], lower, np.eye(lower.shape[1]))
    # rotation L⁻¹, by way of Lᵀ x = rotationᵀ.
    of_unit_rows = np.linalg.solve(triangle.transpose(0, 2, 1), rotation.transpose(0, 2, 1)).transpose(0, 2, 1)
    result: Array = (of_unit_rows / np.where(norms > 0, norms, 1)[:, None, :]) @ factor
    in_range = ((norms > 1e-140) & (norms < 1e140) | (norms == 0)).all(axis=1)
    for i in np.flatnonzero(~(cholesky & in_range) & np.isfinite(norms).all(axis=1)):
        unit = unit_rows(factor[i])[1]
        if cholesky[i]:
            result[i] = of_unit_rows[i] @ unit
        else:
            q = np.linalg.qr(unit.T)[0].T
            result[i] = rotation[i][:, : len(q)] @ q
    return result


def _of_other(file: TensorFile, matrix: Matrix, most: int) -> tuple[Array, Array, Array]:
    """sigma (k,), left (k, rows) and right (k, cols), k = most, of an update that is no sum of products."""
    update = matrix.update
    if isinstance(update, Kronecker):
        (s, u, v), (t, x, y) = (_of_side(file, matrix, side) for side in (update.left, update.right))
        order = np.argsort(-np.multiply.outer(s, t), axis=None, kind="stable")[:most]
        i, j = np.unravel_index(order, (len(s), len(t)))
        sigma = s[i] * t[j]
        return sigma, _kron(u[i], x[j]), _kron(v[i], y[j])
    assert isinstance(update, Whole)
    return _of_side(file, matrix, update, most)


def _of_side(
    file: TensorFile, matrix: Matrix, update: Sum | Whole, most: int | None = None
) -> tuple[Array, Array, Array]:
    if isinstance(update, Sum):
        a, b, scaling = load_factors(file, [update])
        sigma, left, right = singular_directions(a, b)
        return sigma[0] * abs(scaling[0]), left[0] * np.sign(scaling[0]), right[0]
    whole = whole_matrix(file, update, matrix.name)
    if most is not None and most < update.rank:
        found = truncated.largest(whole, most, vectors=True)
        return found.sigma, found.left.T, found.right.T
    try:
        u, sigma, vt = np.linalg.svd(whole, full_matrices=False)
    except np.linalg.LinAlgError:
        raise AnalysisError(f"{file.path}: the singular directions of {matrix.name} could not be computed") from None
    return sigma, u.T, vt


def _kron(x: Array, y: Array) -> Array:
    """Kronecker product of each row of ``x`` with the same row of ``y``."""
    return (x[:, :, None] * y[:, None, :]).reshape(len(x), -1)
