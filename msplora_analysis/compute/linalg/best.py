"""The best approximation of a large matrix by one of low rank, without its whole singular value decomposition.

The error of the best one is the norm of the singular values that it leaves out (Eckart & Young 1936). A basis of
Krylov type (``krylov``) gives one whose error exceeds that by less than a stated share; where the basis would have to
become large, the eigenvectors of AᵀA give it. AᵀA has half of the digits, but here that hurts nobody: a subspace that
is off by ε loses ε² of the energy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.linalg.device import library, like, to_host
from msplora_analysis.compute.linalg.krylov import Basis, krylov
from msplora_analysis.compute.measures.rank_needed import energy_rank

Array = NDArray[np.float64]

TOLERANCE = 1e-6
"""By how much the error may exceed that of the best approximation, relative to it."""

_SURE = 0.1  # the part of TOLERANCE that is used: ``Basis.excess`` is no strict bound
_OVERSAMPLING = 8  # columns of a block beyond the rank
_BLOCK = 48  # columns of a block where the rank is not known yet
_SMALL = 1024  # up to this many columns, all eigenvectors of AᵀA cost no more
_ROUNDING = 64 * float(np.finfo(np.float64).eps)


class Best(NamedTuple):
    """``left * sigma @ right``. left: (rows, k); sigma: (k,), descending; right: (k, cols). float64, of numpy."""

    left: Array
    sigma: Array
    right: Array


def best(matrix: Any, *, rank: int | None = None, energy: float | None = None) -> Best:
    """The best approximation of a rank, or the one of least rank that holds a share of the energy.

    Its error is at most 1 + TOLERANCE times the least possible, or 1e-7 of the matrix's norm where that is more.

    Args:
        matrix: (rows, cols), float64, finite, of numpy or of torch on any device.
        rank: How many singular triples; fewer where the matrix has fewer.
        energy: In place of it, the share of the sum of sigma² that is kept, in (0, 1].

    Example:
        >>> best(np.diag([3.0, 2.0, 1.0]), rank=2).sigma
        array([3., 2.])
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, sigma, right = best(matrix.T, rank=rank, energy=energy)
        return Best(right.T, sigma, left.T)
    scale = max(float(matrix.max()), -float(matrix.min()))
    if scale == 0:
        return Best(np.empty((matrix.shape[0], 0)), np.empty(0), np.empty((0, matrix.shape[1])))
    if not 1e-140 < scale < 1e140:  # squares are taken
        left, sigma, right = best(matrix / scale, rank=rank, energy=energy)
        return Best(left, sigma * scale, right)
    directions = _by_krylov(matrix, rank, energy)
    if directions is None:
        directions = _by_eigenvectors(matrix, rank, energy)
    return _ritz(matrix, directions)


def _by_krylov(a: Any, rank: int | None, energy: float | None) -> Any:
    """Columns (n, k) that span the right singular vectors, or None where another way is cheaper."""
    n = a.shape[1]
    width = _BLOCK if rank is None else rank + _OVERSAMPLING
    if n <= _SMALL or n <= 12 * width:
        return None
    total = float((a * a).sum())
    most = n // 4 if rank is None else n // 2
    check = 3 * width
    for basis in krylov(a, width):
        held = len(basis.projected)
        if held >= check:
            k = _enough(basis, total, rank, energy)
            if k:
                return basis.vectors @ like(np.linalg.eigh(basis.projected)[1][:, -k:], a)
            check = held + max(2 * width, held // 4)
        if held + width > most:
            return None
    return None


def _enough(basis: Basis, total: float, rank: int | None, energy: float | None) -> int:
    """How many leading directions of the basis are the approximation; 0 while it is not good enough."""
    kept = np.cumsum(np.linalg.eigvalsh(basis.projected)[::-1])
    k = rank if energy is None else 1 + int(np.searchsorted(kept, energy * total))
    assert k is not None
    if k > len(kept) - basis.width:
        return 0
    lost = max(total - float(kept[k - 1]), 0.0)
    if lost <= _ROUNDING * total:
        return k
    return k if basis.excess(k) <= 2 * _SURE * TOLERANCE * lost else 0


def _by_eigenvectors(a: Any, rank: int | None, energy: float | None) -> Any:
    gram = a.T @ a
    n = len(gram)
    if rank is not None and library(a) is np and rank < n // 4:
        from scipy.linalg import eigh  # only some of the eigenvectors, which takes half of the time

        return eigh(gram, subset_by_index=[n - rank, n - 1], overwrite_a=True, check_finite=False)[1]
    values, vectors = library(a).linalg.eigh(gram)
    if energy is not None:
        rank = int(energy_rank(np.sqrt(np.maximum(to_host(values)[::-1], 0)), energy))
    assert rank is not None
    return vectors[:, max(n - rank, 0) :]


def _ritz(a: Any, directions: Any) -> Best:
    """The singular triples of ``a`` in the span of directions, without those that are but rounding."""
    linalg = library(a).linalg
    v = linalg.qr(directions)[0]
    left, sigma, rotation = map(to_host, linalg.svd(a @ v, full_matrices=False))
    known = int((sigma > max(a.shape) * np.finfo(np.float64).eps * sigma[0]).sum())
    return Best(left[:, :known], sigma[:known], rotation[:known] @ to_host(v).T)
