"""What the updates of one adapter share, by pairs of layers and by pairs of scales: the work behind ``redundancy``.

Directions are held in blocks, so that memory stays bounded: every block is compared with itself and with those after
it, by one matrix product for each side, and is computed anew where not all fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.adapters.moments import moments_file, open_moments
from msplora_analysis.adapters.opening import opened
from msplora_analysis.compute.linalg.directions import Directions, directions, held
from msplora_analysis.compute.measures import divergence
from msplora_analysis.compute.measures.overlap import (
    Array,
    expected_overlap,
    inner_products,
    overlap_deviation,
    subspace_overlap,
    update_cosine,
)
from msplora_analysis.compute.measures.rank_needed import energy_rank
from msplora_analysis.compute.results import Columns, Redundancy
from msplora_analysis.compute.tasks import Piece
from msplora_analysis.compute.weighted import Module, fitting, products_at, weights_of
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.names import stack_and_layer
from msplora_analysis.formats.updates import Matrix, Product, Sum
from msplora_analysis.options import Options
from msplora_core.moments import Directions as TaskDirections
from msplora_core.moments import directions as task_directions

_HELD = 2**28  # bytes of directions held at once
_PRODUCTS = 2**24  # bytes of inner products held at once

Indices = NDArray[np.integer[Any]]


def measure(piece: Piece, options: Options) -> Redundancy:
    """What a worker computes of an adapter: the places that fall to its part."""
    notes: list[str] = []
    with opened(piece.adapter, options, base_notes=piece.part == 0) as (file, contents):
        places = _places(contents.matrices)
        task = _task(file, piece, options, contents.matrices, notes)
        pairs = [
            _between_layers(file, units, options.top_k, notes, task)
            for units in _share(list(places.values()), piece)
            if len(units) > 1
        ]
        scales = [
            _between_scales(file, acting, options.top_k, task)
            for acting in _share(list(_acting(contents.matrices, places).values()), piece)
        ]
    files = frozenset(file.states.values())
    return Redundancy(piece.adapter, pairs, scales, contents.unknown, [*contents.notes, *notes], files)


class _Task:
    """What moments say: the modules by name, and the task directions of matrices in terms of their factors."""

    def __init__(self, matrices: Sequence[Matrix], modules: dict[str, Module]) -> None:
        self.modules = modules
        self._weights = weights_of(matrices, modules)
        self._known: dict[Matrix, TaskDirections] = {}

    def of(self, units: Sequence[Matrix]) -> dict[Matrix, TaskDirections]:
        """The directions of those units that have any."""
        for unit in units:
            if unit in self._weights and unit not in self._known:
                self._known[unit] = task_directions(*self._weights[unit])
        return {unit: self._known[unit] for unit in units if unit in self._known}

    def counts(self, units: Sequence[Matrix]) -> Indices:
        """How many task directions hold most of each unit's task energy; 0 where it has none."""
        known = self.of(units)
        return np.array([_counted(known[unit].sigma) if unit in known else 0 for unit in units])


def _counted(sigma: Array) -> int:
    return int(np.nan_to_num(energy_rank(sigma)))


def _task(
    file: TensorFile, piece: Piece, options: Options, matrices: Sequence[Matrix], notes: list[str]
) -> _Task | None:
    path = moments_file(piece.adapter, options)
    if path is None:
        return None
    checked = matrices if piece.part == 0 else ()  # once is enough
    return _Task(matrices, fitting(file, path, open_moments(path, file.states).modules, matrices, checked, notes))


def _places(matrices: Sequence[Matrix]) -> dict[tuple[Any, ...], list[Matrix]]:
    """The units that may be compared with one another, in the file's order."""
    places: dict[tuple[Any, ...], list[Matrix]] = {}
    for matrix in matrices:
        stack, layer = stack_and_layer(matrix.name)
        inside = matrix.name.removeprefix(f"{stack}.{layer}.")
        key = (matrix.scale, matrix.module, stack, inside, matrix.update.rows, matrix.update.cols)
        if matrix.group is not None:
            places.setdefault(key, []).append(matrix)
    return places


def _share(places: Sequence[Any], piece: Piece) -> Sequence[Any]:
    return places[piece.part :: piece.parts]


def _between_layers(
    file: TensorFile, units: Sequence[Matrix], top_k: int | None, notes: list[str], task: _Task | None
) -> Columns:
    """Rows of the pairs table: all units at one place."""
    n = len(units)
    i, j = np.triu_indices(n, 1)
    limits = [held(unit, top_k) for unit in units]
    size = max(1, _HELD // (8 * max(limits) * (units[0].update.rows + units[0].update.cols)))
    starts = range(0, n, size if size < n else n)
    sigma, lengths = np.zeros((n, max(limits))), np.array(limits)
    overlaps: dict[str, Array] = {}
    for start in starts:
        some = units[start : start + size]
        mine = directions(file, some, top_k, task.of(some) if task else None)
        sigma[start : start + size, : mine.sigma.shape[1]] = mine.sigma
        for other in range(start, n, size):
            others = units[other : other + size]
            theirs = mine if other == start else directions(file, others, top_k, task.of(others) if task else None)
            counts = (task.counts(some), task.counts(others)) if task else None
            for name, values in _all_pairs(mine, theirs, top_k, counts).items():
                whole = overlaps.setdefault(name, np.full((n, n), np.nan))
                whole[start : start + size, other : other + size] = values
    if lengths.min() < lengths.max():
        notes.append(
            f"{units[0].module}: layers have {lengths.min()} to {lengths.max()} singular values; divergences compare "
            "the same number of largest ones of each pair"
        )
    return {
        "scale": units[0].scale,
        "module": units[0].module,
        **_of_sides(units, i, j, "group", "name"),
        **_divergences(sigma, lengths, i, j),
        **{name: values[i, j] for name, values in overlaps.items()},
    }


def _of_sides(units: Sequence[Matrix], i: Indices, j: Indices, *names: str) -> Columns:
    """The columns group_i, group_j, ... of the pairs of units i and j."""
    sides = (("i", i.tolist()), ("j", j.tolist()))
    return {f"{name}_{side}": [getattr(units[x], name) for x in index] for name in names for side, index in sides}


def _all_pairs(x: Directions, y: Directions, top_k: int | None, counts: tuple[Indices, ...] | None) -> dict[str, Array]:
    """Measures of every unit of ``x`` with every one of ``y`` (n, m), or half of them if these are the same.

    counts: how many task directions of the units of either (n), (m) are compared.
    """
    n, m = len(x.rank), len(y.rank)
    most = max(1, _PRODUCTS // (4 * x.sigma.shape[1] * y.sigma.shape[1] * m))
    step = min(most, -(-n // 8)) if x is y else most
    found: dict[str, Array] = {}
    for start in range(0, n, step):
        first = start if x is y else 0
        rows, cols = x.part(slice(start, start + step)), y.part(slice(first, None))
        inner_out, inner_in = inner_products(rows.left, cols.left), inner_products(rows.right, cols.right)
        pair = (slice(None), None), (None, slice(None))
        measured = _measures(rows, cols, pair, inner_out, inner_in, top_k)
        if counts is not None:
            k = np.minimum(counts[0][start : start + step, None], counts[1][None, first:])
            measured |= _task_overlaps(rows, cols, inner_out, inner_in, k, top_k)
        for name, values in measured.items():
            found.setdefault(name, np.full((n, m), np.nan))[start : start + step, first:] = values
    return found


def _task_overlaps(
    x: Directions, y: Directions, inner_out: Array, inner_in: Array, k: Indices, top_k: int | None
) -> dict[str, Array]:
    """Overlaps (n, m) of the spaces of the first k task directions."""
    assert x.task_in is not None
    assert y.task_in is not None
    assert x.task_out is not None
    assert y.task_out is not None
    k = np.minimum(k, np.minimum(x.rank[:, None], y.rank[None]))
    if top_k is not None:
        k = np.minimum(k, top_k)
    of_in = x.task_in[:, None] @ inner_in @ y.task_in[None].swapaxes(-1, -2)
    of_out = x.task_out[:, None] @ inner_out @ y.task_out[None].swapaxes(-1, -2)
    rows, cols = x.left.shape[-1], x.right.shape[-1]
    return {
        "task_overlap_in": subspace_overlap(of_in, k),
        "task_overlap_out": subspace_overlap(of_out, k),
        "task_overlap_expected": (expected_overlap(k, cols) + expected_overlap(k, rows)) / 2,
    }


def _measures(
    x: Directions, y: Directions, pair: tuple[Any, Any], inner_out: Array, inner_in: Array, top_k: int | None
) -> dict[str, Array]:
    """Overlaps and cosines, in the shape of ``x.rank[pair[0]]`` with ``y.rank[pair[1]]``."""
    of_x, of_y = pair
    k = np.minimum(x.rank[of_x], y.rank[of_y])
    if top_k is not None:
        k = np.minimum(k, top_k)
    rows, cols = x.left.shape[-1], x.right.shape[-1]
    cosine = update_cosine(inner_out, inner_in, x.sigma[of_x], y.sigma[of_y])
    expected_in, expected_out = expected_overlap(k, cols), expected_overlap(k, rows)
    return {
        "overlap_in": subspace_overlap(inner_in, k),
        "overlap_out": subspace_overlap(inner_out, k),
        "overlap_expected": (expected_in + expected_out) / 2,
        "cosine": np.where(x.complete[of_x] & y.complete[of_y], cosine, np.nan),
        "k": k,
        "expected_in": expected_in,
        "expected_out": expected_out,
        "deviation_in": overlap_deviation(k, cols),
        "deviation_out": overlap_deviation(k, rows),
    }


def _divergences(sigma: Array, lengths: Indices, i: Indices, j: Indices) -> dict[str, Array]:
    """Divergences of the spectra sigma[i] and sigma[j], each pair cut to the smaller of their lengths."""
    found = {name: np.full(len(i), np.nan) for name in ("kl_ij", "kl_ji", "js", "wasserstein")}
    shorter = np.minimum(lengths[i], lengths[j])
    for r in np.unique(shorter):
        at = np.flatnonzero(shorter == r)
        p, q = divergence.normalise(sigma[i[at], :r]), divergence.normalise(sigma[j[at], :r])
        found["kl_ij"][at] = divergence.kl(p, q)
        found["kl_ji"][at] = divergence.kl(q, p)
        found["js"][at] = divergence.jensen_shannon(p, q)
        found["wasserstein"][at] = divergence.wasserstein(p, q)
    return found


_Acting = tuple[Matrix, Sequence[Matrix]]  # the total of one layer of a place, and the units that act in it


def _acting(matrices: Sequence[Matrix], places: Any) -> dict[tuple[Any, ...], list[_Acting]]:
    """Of every place with totals: for each layer, the units of the scales whose products its total is the sum of."""
    owner: dict[Product, Matrix] = {}
    for matrix in matrices:
        if matrix.scale != "total" and isinstance(matrix.update, Sum):
            owner.update(dict.fromkeys(matrix.update.products, matrix))
    found: dict[tuple[Any, ...], list[_Acting]] = {}
    for key, totals in places.items():
        if key[0] == "total":
            for total in totals:
                products = total.update.products if isinstance(total.update, Sum) else ()
                units = list(dict.fromkeys(owner[product] for product in products if product in owner))
                if len(units) > 1:
                    found.setdefault(key, []).append((total, units))
    return found


def _between_scales(file: TensorFile, layers: Sequence[_Acting], top_k: int | None, task: _Task | None) -> Columns:
    """Rows of the table of scales: all layers at one place."""
    update = layers[0][0].update
    most = max(held(unit, top_k) for _, units in layers for unit in units)
    size = max(1, _HELD // (16 * most * (update.rows + update.cols)))
    blocks = [_scales_block(file, layers[start : start + size], top_k, task) for start in range(0, len(layers), size)]
    return {
        name: values if isinstance(values, str) else [v for block in blocks for v in block[name]]
        for name, values in blocks[0].items()
    }


def _scales_block(file: TensorFile, layers: Sequence[_Acting], top_k: int | None, task: _Task | None) -> Columns:
    units = list(dict.fromkeys(unit for _, acting in layers for unit in acting))
    number = {unit: x for x, unit in enumerate(units)}
    both = [(total, *pair) for total, acting in layers for pair in combinations(acting, 2)]
    i, j = (np.array([number[pair[side]] for pair in both]) for side in (1, 2))
    known = directions(file, units, top_k)
    inner_out = known.left[i] @ known.left[j].transpose(0, 2, 1)
    inner_in = known.right[i] @ known.right[j].transpose(0, 2, 1)
    return {
        "module": both[0][0].module,
        "group": [total.group for total, _, _ in both],
        "name": [total.name for total, _, _ in both],
        **_of_sides(units, i, j, "scale", "group", "name"),
        **_divergences(known.sigma, known.lengths, i, j),
        **_measures(known, known, (i, j), inner_out, inner_in, top_k),
        **({} if task is None else _scales_by_task(both, top_k, task)),
    }


def _scales_by_task(both: Sequence[tuple[Matrix, Matrix, Matrix]], top_k: int | None, task: _Task) -> dict[str, Array]:
    """Overlaps and cosines of two scales in one layer, in the metric of that layer."""
    found = np.full((3, len(both)), np.nan)
    for row, (total, *units) in enumerate(both):
        if (module := task.modules.get(total.name)) is None:
            continue
        places = dict(products_at(total))
        at = [places[unit.update.products[0]] for unit in units if isinstance(unit.update, Sum)]
        (s, left, right), (t, other_left, other_right) = (task_directions(*module.weights.part(of)) for of in at)
        inner_in = right @ module.weights.s_a[at[0], at[1]] @ other_right.T
        # the columns of left hold sigma
        inner_out = left.T @ module.weights.s_b[at[0], at[1]] @ other_left
        sizes = np.outer(s, t)
        inner_out = np.divide(inner_out, sizes, out=np.zeros_like(sizes), where=sizes > 0)
        k = min(_counted(s), _counted(t), top_k or len(s))
        found[:, row] = (
            subspace_overlap(inner_in, k),
            subspace_overlap(inner_out, k),
            update_cosine(inner_out, inner_in, s, t),
        )
    return dict(zip(("task_overlap_in", "task_overlap_out", "task_cosine"), found, strict=True))
