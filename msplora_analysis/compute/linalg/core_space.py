"""Several updates of one weight in the space that all of them span: small matrices in place of large ones.

With all A_i stacked, and all B_i side by side, two thin QR decompositions give ``right`` and ``left``, whose rows and
columns are orthonormal; then B_i A_i = left C_i right, where C_i is a small matrix. Norms, inner products, singular
values and whatever else does not change under rotation is that of the C_i, exactly; so are sums, means and truncated
singular value decompositions. Core Space merging (Panariello et al. 2025, arXiv 2509.17786) works in such a space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


class CoreSpace(NamedTuple):
    """``left @ cores[i] @ right`` is the i-th update.

    left: (rows, p), orthonormal columns. right: (q, cols), orthonormal rows. outer: of each update (p, r_i), and
    inner: (r_i, q): its B and its A in these bases. p and q are at most the sum of all r_i.
    """

    left: Array
    right: Array
    outer: list[Array]
    inner: list[Array]

    @property
    def cores(self) -> list[Array]:
        """Of each update the matrix (p, q)."""
        return [b @ a for b, a in zip(self.outer, self.inner, strict=True)]

    def factors(self, core: Array, rank: int | None = None) -> tuple[Array, Array]:
        """A (k, cols) and B (rows, k) of the best approximation of ``left @ core @ right``; see ``balanced``."""
        a, b = balanced(core, rank)
        return a @ self.right, self.left @ b


def core_space(factors: Sequence[tuple[Array, Array]]) -> CoreSpace:
    """The space of some updates of one shape.

    Args:
        factors: Of each A (r_i, cols) and B (rows, r_i), float64; scalings are in them.

    Example:
        >>> space = core_space([(a, b), (other_a, other_b)])
        >>> one, two = space.cores
        >>> cosine = (one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two)
    """
    ends = np.cumsum([len(a) for a, _ in factors])[:-1]
    left, outer = np.linalg.qr(np.concatenate([b for _, b in factors], axis=1))
    right, inner = np.linalg.qr(np.concatenate([a for a, _ in factors]).T)
    return CoreSpace(left, right.T, np.split(outer, ends, axis=1), np.split(inner.T, ends))


def balanced(core: Array, rank: int | None = None) -> tuple[Array, Array]:
    """Factors (k, q) and (p, k) of the best approximation of a matrix; the root of each singular value is in either.

    rank: at most so many singular values are kept; None: all.
    """
    u, sigma, vt = np.linalg.svd(core, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    return root[:, None] * vt[:rank], u[:, :rank] * root
