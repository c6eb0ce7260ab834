"""What layers could share: the nearest pyramid of MSPLoRA to updates that were trained without one.

Of layers with updates M_i (of one type, shape and stack) a pyramid is M_i ≈ G + H_g(i) + K_i: G of rank r_g for all,
H of rank r_m for each group of layers, K of rank r_l for each layer (arXiv 2503.21838, eq. 4-6). Each of the three is
the best approximation of what the others leave, on average over the layers that have it: alternating least squares,
whose error falls with every step. Where the updates are a pyramid, it starts there: the columns of all layers have
those of G in common, those of a group also those of H; and with bases U, V of what columns and rows have in common, the
rank of M - U X Vᵀ is lower than that of M by that of X, where X⁻¹ = Vᵀ M⁺ U (the Wedderburn-Guttman theorem; see arXiv
2406.03992, lemma 1.1).

All of it happens in the span of the layers' factors, which holds every best approximation: matrices of at most L r rows
and columns for L layers of rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.linalg.best import best
from msplora_analysis.compute.linalg.core_space import core_space

Array = NDArray[np.floating[Any]]

MOST = 100  # rounds of the alternation
_DONE = 3e-4  # it ends where a round lowers the error's square by less than this share
_EXACT = 1e-12  # of the squared norm: what float32 rounds off
_COMMON = 0.999  # of a direction's length that lies in the space of each layer, where it counts as common
_ROUNDING = 1e-6  # of the largest singular value: what files in half precision have none of
_DENSE = 256  # up to this size all singular triples cost no more


class Part(NamedTuple):
    """``b @ a``, an update or a part of one: (rows, rank) and (rank, cols)."""

    b: Array
    a: Array

    @property
    def whole(self) -> Array:
        return self.b @ self.a


class Pyramid(NamedTuple):
    """The parts of the layers of one type. ``mid``: of each group. ``layer``: of each layer. ``lost``: the squared
    Frobenius norm of what it leaves of each layer, (layers,).
    """

    shared: Part
    mid: list[Part]
    layer: list[Part]
    lost: Array


class Ranks(NamedTuple):
    """Of the three scales; 0: it has none."""

    shared: int
    mid: int
    layer: int


def turned_at_random(update: Part, rng: np.random.Generator) -> Part:
    """An update of the same singular values, in directions that are drawn uniformly."""
    sigma = np.linalg.svd(np.linalg.qr(update.b)[1] @ np.linalg.qr(update.a.T)[1].T, compute_uv=False)
    left, right = (np.linalg.qr(rng.standard_normal((n, len(sigma))))[0] for n in (len(update.b), update.a.shape[1]))
    return Part(left * sigma, right.T)


def contiguous_groups(layers: Sequence[int], groups: int) -> list[int]:
    """The group of each layer, as MSPLoRA makes them: runs whose sizes differ by one at most, longer ones first."""
    ordered = sorted(set(layers))
    runs = np.array_split(ordered, min(groups, len(ordered)))
    group_of = {int(layer): group for group, run in enumerate(runs) for layer in run}
    return [group_of[layer] for layer in layers]


def nearest_pyramid(
    updates: Sequence[Part],
    groups: Sequence[int],
    ranks: Ranks,
    weights: Sequence[float] | None = None,
    *,
    starts: bool = True,
) -> Pyramid:
    """The pyramid nearest to updates, in Frobenius norm.

    Alternating least squares finds a minimum, not certainly the lowest: the best of several starts is taken. Updates
    that are a pyramid of these ranks are found again.

    Args:
        updates: Of each layer, as factors: (rows, r) and (r, cols), float64.
        groups: The group of each layer, 0, 1, ...
        ranks: Of the scales.
        weights: How much the squared error of each layer counts; None: all alike.
        starts: Try several; else one: what is in common, or, where nothing is, what is each layer's own.

    Returns:
        Parts of exactly these ranks, padded with zeros.
    """
    space = core_space([(update.a, update.b) for update in updates])
    small = [Part(b, a) for b, a in zip(space.outer, space.inner, strict=True)]
    found = _Search(small, groups, ranks, weights).best(starts)
    padded = [
        [_padded(Part(space.left @ part.b, part.a @ space.right), rank) for part in parts]
        for parts, rank in zip(found.parts, ranks, strict=True)
    ]
    return Pyramid(padded[0][0], padded[1], padded[2], found.lost)


class _Found(NamedTuple):
    parts: tuple[list[Part], list[Part], list[Part]]
    lost: Array
    error: float


class _Search:
    """The alternation, in the span of the layers."""

    def __init__(
        self, updates: list[Part], groups: Sequence[int], ranks: Ranks, weights: Sequence[float] | None
    ) -> None:
        self.updates, self.groups, self.ranks = updates, np.asarray(groups), ranks
        self.weights = np.ones(len(updates)) if weights is None else np.asarray(weights, dtype=np.float64)
        self.members = [np.flatnonzero(self.groups == group) for group in range(int(self.groups.max()) + 1)]
        self.squares = np.array([np.sum((update.b.T @ update.b) * (update.a @ update.a.T)) for update in updates])
        self.sums = [self._sum(updates, members) for members in self.members]
        self.none = Part(np.zeros((len(updates[0].b), 0)), np.zeros((0, updates[0].a.shape[1])))

    def best(self, starts: bool) -> _Found:
        """From what is in common, or else from what is each layer's own; and, if wanted, from what is shared most."""
        first = self._common()
        found = self._from(*first, self._own(*first)[0])
        if not starts or found.error <= _EXACT * float(self.weights @ self.squares):
            return found
        nothing = self.none, [self.none] * len(self.members)
        others = [self._from(*nothing, [self.none] * len(self.updates))]
        if any(part.b.shape[1] for part in (first[0], *first[1])):
            others.append(self._from(*nothing, self._own(*nothing)[0]))
        return min([found, *others], key=lambda one: one.error)

    def _from(self, shared: Part, mid: list[Part], layer: list[Part]) -> _Found:
        """The alternation from these parts."""
        whole, before = float(self.weights @ self.squares), np.inf
        for _ in range(MOST):
            shared = self._mean(range(len(self.members)), None, mid, layer, self.ranks.shared)
            mid = [self._mean([group], shared, mid, layer, self.ranks.mid) for group in range(len(self.members))]
            layer, lost = self._own(shared, mid)
            error = float(self.weights @ lost)
            if error <= _EXACT * whole or error > (1 - _DONE) * before:
                break
            before = error
        return _Found(([shared], mid, layer), lost, error)

    def _sum(self, parts: Sequence[Part], members: NDArray[np.int_]) -> Array:
        """The weighted sum of some layers' parts."""
        b = np.concatenate([self.weights[i] * parts[i].b for i in members], axis=1)
        return b @ np.concatenate([parts[i].a for i in members])

    def _mean(self, groups: Sequence[int], shared: Part | None, mid: list[Part], layer: list[Part], rank: int) -> Part:
        """The best part of a rank for what the other scales leave of the layers of some groups.

        shared: That scale, if it is another; else ``mid`` is.
        """
        if rank == 0:
            return self.none
        rest, weight = np.zeros_like(self.sums[0]), 0.0
        for group in groups:
            members = self.members[group]
            of_group = float(self.weights[members].sum())
            other = mid[group] if shared is None else shared
            rest += self.sums[group] - of_group * other.whole - self._sum(layer, members)
            weight += of_group
        return _cut(rest / weight, rank) if weight else self.none

    def _own(self, shared: Part, mid: list[Part]) -> tuple[list[Part], Array]:
        """The best layer part of each layer, and the squared norms of what then is left."""
        layer, lost = [], []
        for update, group in zip(self.updates, self.groups, strict=True):
            b = np.hstack([update.b, -shared.b, -mid[group].b])
            left, sigma, right = _triples(Part(b, np.vstack([update.a, shared.a, mid[group].a])))
            rank = self.ranks.layer
            layer.append(Part(left[:, :rank] * sigma[:rank], right[:, :rank].T))
            lost.append(float(np.sum(sigma[rank:] ** 2)))
        return layer, np.array(lost)

    def _common(self) -> tuple[Part, list[Part]]:
        """What all layers have in common, and then those of each group; exact where the updates are a pyramid."""
        total = sum(self.ranks)
        rest = [_leading(update, total) for update in self.updates]
        shared, mid = self.none, []
        if self.ranks.shared and len(self.members) > 1:
            shared = self._in_common(rest, self.ranks.shared)
            rest = [Part(np.hstack([part.b, -shared.b]), np.vstack([part.a, shared.a])) for part in rest]
            rest = [_leading(part, self.ranks.mid + self.ranks.layer) for part in rest]
        for members in self.members:
            of_group = [rest[i] for i in members]
            if len(members) == 1:
                mid.append(_leading(of_group[0], self.ranks.mid))
            else:
                mid.append(self._in_common(of_group, self.ranks.mid))
        return shared, mid

    def _in_common(self, updates: list[Part], rank: int) -> Part:
        """The part that lowers the rank of each update by its own."""
        triples = [_triples(update, _ROUNDING) for update in updates]
        u, v = (_common_space([triple[side] for triple in triples]) for side in (0, 2))
        k = min(rank, u.shape[1], v.shape[1])
        if k == 0:
            return self.none
        u, v = u[:, :k], v[:, :k]
        inverses = [(v.T @ right / sigma) @ (left.T @ u) for left, sigma, right in triples]
        if not all(np.linalg.cond(inverse) < 1e8 for inverse in inverses):
            return self.none
        x = np.mean([np.linalg.inv(inverse) for inverse in inverses], axis=0)
        return Part(u @ x, v.T)


def _cut(matrix: Array, rank: int) -> Part:
    """The best approximation of a rank."""
    if max(matrix.shape) <= _DENSE:
        left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    else:
        left, sigma, right = best(matrix, rank=rank)
    return Part(left[:, :rank] * sigma[:rank], right[:rank])


def _triples(update: Part, least: float = 0.0) -> tuple[Array, Array, Array]:
    """Left vectors (rows, k), sigma (k,) and right vectors (cols, k) of an update, where above ``least`` sigma_1."""
    q_b, r_b = np.linalg.qr(update.b)
    q_a, r_a = np.linalg.qr(update.a.T)
    left, sigma, right = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    known = int((sigma > least * sigma[0]).sum()) if sigma.size else 0
    return q_b @ left[:, :known], sigma[:known], q_a @ right[:known].T


def _leading(update: Part, rank: int) -> Part:
    left, sigma, right = _triples(update)
    return Part(left[:, :rank] * sigma[:rank], right[:, :rank].T)


def _common_space(bases: Sequence[Array]) -> Array:
    """Orthonormal columns that lie in the span of every basis."""
    if not all(basis.shape[1] for basis in bases):
        return np.empty((len(bases[0]), 0))
    left, sigma, _ = np.linalg.svd(np.concatenate(bases, axis=1), full_matrices=False)
    return left[:, : int((sigma**2 >= _COMMON * len(bases)).sum())]


def _padded(part: Part, rank: int) -> Part:
    """A part of that rank, half of each singular value in either factor."""
    left, sigma, right = _triples(part)
    root = np.sqrt(sigma[:rank])
    part = Part(left[:, :rank] * root, root[:, None] * right[:, :rank].T)
    missing = rank - part.b.shape[1]
    return Part(np.pad(part.b, ((0, 0), (0, missing))), np.pad(part.a, ((0, missing), (0, 0))))
