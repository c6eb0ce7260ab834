"""Bases of the row space of a large matrix that hold its largest singular directions ever better.

Block Krylov (Musco & Musco 2015, arXiv 1504.05477): from a random block, an orthonormal basis of the row space is grown
by powers of AᵀA. Large products run where the matrix is (``device``), small matrices stay here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.linalg.device import library, like, to_host

Array = NDArray[np.float64]


class Basis(NamedTuple):
    """An orthonormal basis (n, d) of columns, where the matrix A (m, n) is; and basisᵀ AᵀA basis (d, d), here.

    The last ``width`` of its columns are the newest block.
    """

    vectors: Any
    projected: Array
    width: int

    def excess(self, k: int) -> float:
        """By how much the k largest eigenvalues of AᵀA may exceed those of ``projected``, in sum.

        Before the newest block the basis held d - width columns. In a basis that starts with those, AᵀA is
        [[T, Cᵀ], [C, E]], with C the coupling to the newest block alone. An eigenvalue λ above those of E is one of
        T + Cᵀ (λ - E)⁻¹ C, which grows as λ falls to the k-th of T: so the sum is at most that of
        T + Cᵀ C / (λ_k - μ), with μ the largest eigenvalue of E. Known of E is the newest block's part; a random
        block would have to miss a direction for μ to be above that by much, and what is stopped at has room for it.
        """
        if len(self.projected) < k + self.width:
            return float("inf")
        old, coupling = np.split(self.projected[: -self.width], [-self.width], axis=1)
        newest = self.projected[-self.width :, -self.width :]
        values = np.linalg.eigvalsh(old)[::-1][:k]
        gap = values[-1] - np.linalg.eigvalsh(newest)[-1]
        if gap <= 0:
            return float("inf")
        above = np.linalg.eigvalsh(old + coupling @ coupling.T / gap)[::-1][:k]
        return float(np.sum(above - values))


def krylov(a: Any, width: int) -> Iterator[Basis]:
    """Bases of ever more columns, ``width`` at a time; the same matrix gives the same.

    a: (m, n), of numpy or torch, finite; n at least ``width``. It is the reader's to stop, before n columns.
    """
    xp, n = library(a), a.shape[1]
    random = like(np.random.default_rng(0).standard_normal((n, width)), a)
    basis = _orthonormal(a.T @ (a @ random))
    projected = np.empty((0, 0))
    while True:
        block = basis[:, len(projected) :]
        image = a.T @ (a @ block)
        coefficients = basis.T @ image
        above, corner = np.split(to_host(coefficients), [len(projected)])
        projected = np.block([[projected, above], [above.T, corner]])
        yield Basis(basis, projected, width)
        image -= basis @ coefficients
        image -= basis @ (basis.T @ image)  # twice is enough
        basis = xp.concatenate([basis, _orthonormal(image, basis)], 1)


def _orthonormal(block: Any, beside: Any = None) -> Any:
    qr = library(block).linalg.qr
    q = qr(block)[0]
    if beside is not None:  # directions that were all but in the basis have only rounding left
        q = qr(q - beside @ (beside.T @ q))[0]
    return q
