"""What layers of one run and of several share: the work behind the null models of ``redundancy --nulls``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.linalg.directions import singular_directions
from msplora_analysis.compute.measures.joint_basis import SHARES, joint_parameters, separate_parameters
from msplora_analysis.compute.measures.metrics import TOLERANCE
from msplora_analysis.compute.measures.overlap import Array, expected_overlap, subspace_overlap
from msplora_analysis.compute.measures.shared_energy import shared_energy
from msplora_analysis.compute.results import Columns

ROTATIONS = 5  # of the layers, for the null model of a common basis
_HELD = 2**22  # values of directions at once

Integers = NDArray[np.integer[Any]]


class Stacked(NamedTuple):
    """Directions of n updates of one shape: sigma (n, K), rank (n,), left (n, K, rows) and right (n, K, cols); zeros
    beyond the rank.
    """

    sigma: Array
    rank: Integers
    left: Array
    right: Array

    def of(self, which: Sequence[int]) -> Stacked:
        """Some of the updates."""
        at = list(which)
        return Stacked(self.sigma[at], self.rank[at], self.left[at], self.right[at])


def stacked(factors: Sequence[tuple[Array, Array]]) -> Stacked:
    """Of updates ``b @ a``, as factors a (r, cols) and b (rows, r)."""
    most = max(len(a) for a, _ in factors)
    n, rows, cols = len(factors), len(factors[0][1]), factors[0][0].shape[1]
    found = Stacked(np.zeros((n, most)), np.zeros(n, int), np.zeros((n, most, rows)), np.zeros((n, most, cols)))
    for i, (a, b) in enumerate(factors):
        (sigma,), (left,), (right,) = singular_directions(a[None], b[None])
        rank = int((sigma > TOLERANCE * sigma[0]).sum())
        found.rank[i] = rank
        found.sigma[i, :rank] = sigma[:rank]
        found.left[i, :rank] = left[:rank]
        found.right[i, :rank] = right[:rank]
    return found


def pairs(of: Stacked, i: Integers, j: Integers, top_k: int | None = None) -> Columns:
    """Of updates i and j, (p,) each: overlaps, shared energy (the mean of both ways), and what chance gives of either.

    The columns are (p,); k is how many directions an overlap compares.
    """
    k = np.minimum(of.rank[i], of.rank[j])
    k = k if top_k is None else np.minimum(k, top_k)
    found: dict[str, Array] = {"k": k}
    for side, held in (("in", of.right), ("out", of.left)):
        overlaps, shared = np.empty(len(i)), np.empty(len(i))
        step = max(1, _HELD // held[0].size)
        for part in (slice(start, start + step) for start in range(0, len(i), step)):
            x, y = i[part], j[part]
            inner = held[x] @ held[y].swapaxes(-1, -2)
            overlaps[part] = subspace_overlap(inner, k[part])
            there, back = shared_energy(inner, of.sigma[y]), shared_energy(inner.swapaxes(-1, -2), of.sigma[x])
            shared[part] = (there + back) / 2
        d = held.shape[-1]
        found |= {f"overlap_{side}": overlaps, f"expected_{side}": expected_overlap(k, d)}
        found |= {f"shared_{side}": shared, f"shared_expected_{side}": (of.rank[i] + of.rank[j]) / 2 / d}
    return found


def joint(of: Stacked, seed: int = 0) -> Columns:
    """For each of ``SHARES``: the parameters of one basis for all updates, of one for the same updates turned at random
    (mean of some rotations), and of a factor pair for each update.
    """
    rng = np.random.default_rng(seed)
    rows, cols = of.left.shape[-1], of.right.shape[-1]
    turned = [
        tuple(
            np.stack([np.linalg.qr(rng.standard_normal((d, of.sigma.shape[1])))[0].T for _ in of.sigma])
            for d in (rows, cols)
        )
        for _ in range(ROTATIONS)
    ]
    return {
        "energy": np.array(SHARES),
        "joint": np.array([joint_parameters(of.left, of.sigma, of.right, share) for share in SHARES]),
        "rotated": np.array(
            [np.mean([joint_parameters(u, of.sigma, v, share) for u, v in turned]) for share in SHARES]
        ),
        "separate": np.array([separate_parameters(of.sigma, rows, cols, share) for share in SHARES]),
    }
