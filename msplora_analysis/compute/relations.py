"""What the updates of several adapters have to do with each other, module by module: the work behind ``relate``.

Every update is its singular directions; all that is said of two follows from the inner products of these, X_out and
X_in. No update is formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.linalg.directions import Directions
from msplora_analysis.compute.measures.metrics import TOLERANCE
from msplora_analysis.compute.measures.overlap import Array, expected_overlap, subspace_overlap
from msplora_analysis.compute.results import Columns

_PRODUCTS = 2**26  # bytes of inner products held at once


def relations(updates: Sequence[Directions], top_k: int | None = None) -> Columns:
    """Every two of n updates of one module, in the order (0, 1), (0, 2), ..., (1, 2), ...

    Args:
        updates: Each of one update, in float64.
        top_k: The most directions that an overlap compares; energies are always of the whole spaces.

    Returns:
        norm_a, norm_b, cosine, overlap_in, overlap_out, expected_in, expected_out, k, energy_a_in_b, energy_b_in_a,
        norm_sum, norm_difference, rank_a, rank_b, rank_sum; (n (n - 1) / 2,) each.
    """
    most = max(1, max(int(update.rank[0]) for update in updates))
    sigma, left, right = (np.zeros((len(updates), most, *shape)) for shape in _shapes(updates[0]))
    rank = np.array([update.rank[0] for update in updates])
    for i, update in enumerate(updates):
        held = min(most, update.sigma.shape[1])
        sigma[i, :held], left[i, :held], right[i, :held] = (
            field[0, :held] for field in (update.sigma, update.left, update.right)
        )
        sigma[i, rank[i] :] = 0  # what is but rounding has no direction
    norms = np.array([np.linalg.norm(update.sigma[0]) for update in updates])
    complete = np.array([update.complete[0] for update in updates])
    rows, cols = left.shape[2], right.shape[2]
    found: list[dict[str, Array]] = []
    step = max(1, _PRODUCTS // (16 * most * most))
    for i in range(len(updates)):
        for start in range(i + 1, len(updates), step):
            j = slice(start, start + step)
            x_out = left[i] @ left[j].transpose(0, 2, 1)
            x_in = right[i] @ right[j].transpose(0, 2, 1)
            k = np.minimum(rank[i], rank[j])
            k = k if top_k is None else np.minimum(k, top_k)
            inner = np.einsum("jab,jab,a,jb->j", x_out, x_in, sigma[i], sigma[j])
            known = complete[i] & complete[j]
            both = np.where(known, norms[i] * norms[j], 0)
            squares = norms[i] ** 2 + norms[j] ** 2
            nan = np.full(len(k), np.nan)
            rank_sum = _rank_of_sum(sigma[i], sigma[j], x_out, x_in, rank[i] + rank[j])
            found.append(
                {
                    "norm_a": np.full(len(k), norms[i]),
                    "norm_b": norms[j],
                    "cosine": np.clip(np.divide(inner, both, out=nan.copy(), where=both > 0), -1, 1),  # rounding
                    "overlap_in": subspace_overlap(x_in, k),
                    "overlap_out": subspace_overlap(x_out, k),
                    "expected_in": expected_overlap(k, cols),
                    "expected_out": expected_overlap(k, rows),
                    "k": k,
                    "energy_a_in_b": _energy(sigma[i][None], x_out, x_in),
                    "energy_b_in_a": _energy(sigma[j], x_out.transpose(0, 2, 1), x_in.transpose(0, 2, 1)),
                    "norm_sum": np.where(known, np.sqrt(np.maximum(squares + 2 * inner, 0)), np.nan),
                    "norm_difference": np.where(known, np.sqrt(np.maximum(squares - 2 * inner, 0)), np.nan),
                    "rank_a": np.full(len(k), rank[i]),
                    "rank_b": rank[j],
                    "rank_sum": np.where(known, rank_sum, np.nan),
                }
            )
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


def _shapes(update: Directions) -> tuple[tuple[int, ...], ...]:
    return (), (update.left.shape[2],), (update.right.shape[2],)


def _energy(sigma: Array, x_out: Array, x_in: Array) -> Array:
    """The share of an update's squared norm that lies in the column and row space of another.

    ‖P_out ΔW P_in‖² / ‖ΔW‖² = ‖X_outᵀ Σ X_in‖² / ‖Σ‖². sigma: (j or 1, a). x_out, x_in: (j, a, b).
    """
    inside = x_out.transpose(0, 2, 1) @ (sigma[:, :, None] * x_in)
    total = (sigma**2).sum(axis=1) + np.zeros(len(inside))
    share = np.divide((inside**2).sum(axis=(1, 2)), total, out=np.full(len(inside), np.nan), where=total > 0)
    return np.minimum(share, 1.0)


def _rank_of_sum(s: Array, t: Array, x_out: Array, x_in: Array, most: NDArray[np.int_]) -> NDArray[np.int_]:
    """How many singular values of either sum exceed TOLERANCE times its largest.

    Spaces that meet in no direction add their ranks. With c the largest cosine between two spaces, no singular value
    of the sum is below the least of the two times (1 - c_out)^½ (1 - c_in)^½: only where that does not settle it, the
    sum is decomposed, in the space of all directions.

    Args:
        s: (a,), singular values of the one, zero beyond its rank. ``t``: (j, b), of the others.
        x_out: (j, a, b), inner products of the directions. ``x_in`` likewise.
        most: (j,), the sums of ranks.
    """
    counts: NDArray[np.int_] = most.copy()
    apart = np.ones(len(t))
    for x in (x_out, x_in):
        gram = x @ x.transpose(0, 2, 1)
        apart *= np.maximum(1 - np.sqrt(np.sqrt((gram**2).sum(axis=(1, 2)))), 0)
    first = s[s > 0].min(initial=np.inf)
    least = np.minimum(first, np.where(t > 0, t, np.inf).min(axis=1, initial=np.inf))
    largest = s.max(initial=0) + t.max(axis=1, initial=0)
    for j in np.flatnonzero(~(np.sqrt(apart) * least > 10 * TOLERANCE * largest) & (most > 0)):
        both = np.concatenate([s[s > 0], t[j][t[j] > 0]])
        lower = [_root(x[j][: np.count_nonzero(s), : np.count_nonzero(t[j])]) for x in (x_out, x_in)]
        sigma = np.linalg.svd(lower[0].T @ (both[:, None] * lower[1]), compute_uv=False)
        # A sum that cancels to rounding is zero.
        counts[j] = 0 if sigma[0] <= TOLERANCE * largest[j] else np.count_nonzero(sigma > TOLERANCE * sigma[0])
    return counts


def _root(x: Array) -> Array:
    """L with L Lᵀ = [[I, X], [Xᵀ, I]], the inner products of two sets of orthonormal directions."""
    gram = np.block([[np.eye(len(x)), x], [x.T, np.eye(x.shape[1])]])
    values, vectors = np.linalg.eigh(gram)
    root: Array = vectors * np.sqrt(np.maximum(values, 0))
    return root
