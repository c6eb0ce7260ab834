"""Two tables of how much weight updates share: between the layers (pairs), and between the scales of one layer.

    pairs = load_pairs("runs/cola")         # one row per unordered pair of layers
    scales = load_scale_pairs("runs/cola")  # MSPLoRA: global with mid, global with layer, mid with layer

Compared are units at one place of one numbered stack: of one scale, one shape, and one path but for the layer's number.
So an encoder is not compared with a decoder, nor one expert with another; where several places share a module's last
name, each has its own rows.

kl_ij, kl_ji, js, wasserstein: of the normalised singular values (``divergence``). Where two have unequal numbers of
them, the larger is cut to the number of the smaller, and both are normalised after that.
overlap_in, overlap_out: of the input (right) and output (left) singular directions, the first K of each; K is the
smaller numerical rank of the two, or ``top_k`` if that is less.
overlap_expected: what random subspaces would give, K / d, the mean of both sides where these differ in d.
cosine: of the whole updates; empty where only the largest singular directions of a large matrix are known.
All are empty for an update of zero. Overlaps and cosines are exact to 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis import divergence
from msplora_analysis.directions import Directions, directions, held
from msplora_analysis.engine import Piece, Progress, compute_each, opened
from msplora_analysis.files import Adapter, StrPath, discover
from msplora_analysis.formats import Matrix, Product, Sum
from msplora_analysis.formats.base import stack_and_layer
from msplora_analysis.options import Options
from msplora_analysis.overlap import (
    Array,
    expected_overlap,
    inner_products,
    overlap_deviation,
    subspace_overlap,
    update_cosine,
)
from msplora_analysis.tensors import TensorFile

if TYPE_CHECKING:
    import pandas as pd

_WHEN = {"run": "str", "step": "Int64", "epoch": "Float64"}
_MEASURES = dict.fromkeys(
    ("kl_ij", "kl_ji", "js", "wasserstein", "overlap_in", "overlap_out", "overlap_expected", "cosine"), "float64"
)
PAIRS = {**_WHEN, "scale": "str", "module": "str", "group_i": "Int64", "group_j": "Int64", **_MEASURES}
SCALES = {
    **_WHEN,
    **{"module": "str", "group": "Int64", "name": "str", "scale_i": "str", "scale_j": "str"},
    **{"group_i": "Int64", "group_j": "Int64"},
    **_MEASURES,
}
DETAILS = {
    **{"name_i": "str", "name_j": "str", "k": "Int64"},
    **{"expected_in": "float64", "expected_out": "float64", "deviation_in": "float64", "deviation_out": "float64"},
}
"""Columns after these with ``details``: places, K, and chance on either side with its standard deviation."""

_HELD = 2**28  # bytes of directions held at once
_PRODUCTS = 2**24  # bytes of inner products held at once

Indices = NDArray[np.integer[Any]]
Columns = dict[str, Any]  # column -> values, or one value for all rows


class Redundancy(NamedTuple):
    """Rows of both tables of one adapter, in blocks; and what a reader must know of it."""

    adapter: Adapter
    pairs: Sequence[Columns]
    scales: Sequence[Columns]
    unknown: Sequence[str]
    notes: Sequence[str]

    def joined(self, others: Sequence[Redundancy]) -> Redundancy:
        """With the rows of further parts of the same adapter."""
        parts = (self, *others)
        return self._replace(
            pairs=[block for part in parts for block in part.pairs],
            scales=[block for part in parts for block in part.scales],
            notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
        )


class Tables(NamedTuple):
    """Both tables of the same adapters."""

    pairs: pd.DataFrame
    scales: pd.DataFrame


def load_pairs(paths: StrPath | Iterable[StrPath], **how: Any) -> pd.DataFrame:
    """One row per unordered pair of layers (or mid groups) within run, step, scale and module.

    Columns: run, step, epoch, scale, module, group_i, group_j (group_i first in the file's order of layers), kl_ij,
    kl_ji, js, wasserstein, overlap_in, overlap_out, overlap_expected, cosine; the module says what they are. For the
    arguments and errors see ``load_redundancy``.
    """
    return load_redundancy(paths, **how).pairs


def load_scale_pairs(paths: StrPath | Iterable[StrPath], **how: Any) -> pd.DataFrame:
    """One row per layer and two scales that act in it, of MSPLoRA; no rows for other methods.

    Columns: run, step, epoch, module, group (the layer), name, scale_i, scale_j, group_i, group_j (the unit of either
    scale), then the measures of ``load_pairs``. For the arguments and errors see ``load_redundancy``.
    """
    return load_redundancy(paths, **how).scales


def load_redundancy(
    paths: StrPath | Iterable[StrPath],
    *,
    top_k: int | None = None,
    details: bool = False,
    workers: int | None = None,
    dask: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tables:
    """Both tables, reading every adapter once.

    top_k: most directions to compare (and to compute of a large matrix without factors).
    details: add the columns of ``DETAILS``.
    workers, dask, progress: see ``engine.compute``.
    options: further fields of ``options.Options``.

    Raises AnalysisError for input that cannot be used as given.
    """
    from msplora_analysis.tables import Warnings, succeeding

    reading = Options(top_k=top_k, **options)
    adapters = discover(paths, full=reading.base is not None)
    said = Warnings()
    found: list[Redundancy] = []
    results: Any = compute_each(measure, adapters, reading, workers=workers, dask=dask, progress=progress)
    for result in succeeding(results):
        said.hear(result)
        found.append(result)  # type: ignore[arg-type]
    said.give()
    extra = DETAILS if details else {}
    return Tables(
        _table([(r.adapter, block) for r in found for block in r.pairs], {**PAIRS, **extra}),
        _table([(r.adapter, block) for r in found for block in r.scales], {**SCALES, **extra}),
    )


def measure(piece: Piece, options: Options) -> Redundancy:
    """What a worker computes of an adapter: the places that fall to its part."""
    notes: list[str] = []
    with opened(piece.adapter, options) as (file, contents):
        places = _places(contents.matrices)
        pairs = [
            _between_layers(file, units, options.top_k, notes)
            for units in _share(list(places.values()), piece)
            if len(units) > 1
        ]
        scales = [
            _between_scales(file, acting, options.top_k)
            for acting in _share(list(_acting(contents.matrices, places).values()), piece)
        ]
    return Redundancy(piece.adapter, pairs, scales, contents.unknown, [*contents.notes, *notes])


def _table(blocks: Sequence[tuple[Adapter, Columns]], types: dict[str, str]) -> pd.DataFrame:
    import pandas as pd

    from msplora_analysis.table_files import with_whole_epochs

    lengths = [len(block["cosine"]) for _, block in blocks]
    columns = {}
    for name, kind in types.items():
        values = [getattr(adapter, name) if name in _WHEN else block[name] for adapter, block in blocks]
        cells = [v if isinstance(v, (np.ndarray, list)) else [v] * n for v, n in zip(values, lengths, strict=True)]
        if kind == "float64":
            columns[name] = pd.Series(np.concatenate([np.empty(0), *cells]), dtype=kind)
        else:
            columns[name] = pd.Series([cell for part in cells for cell in part], dtype=kind)
    return with_whole_epochs(pd.DataFrame(columns))


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


def _between_layers(file: TensorFile, units: Sequence[Matrix], top_k: int | None, notes: list[str]) -> Columns:
    """Rows of the pairs table: all units at one place."""
    n = len(units)
    i, j = np.triu_indices(n, 1)
    limits = [held(unit, top_k) for unit in units]
    size = max(1, _HELD // (8 * max(limits) * (units[0].update.rows + units[0].update.cols)))
    starts = range(0, n, size if size < n else n)
    sigma, lengths = np.zeros((n, max(limits))), np.array(limits)
    overlaps: dict[str, Array] = {}
    for start in starts:
        mine = directions(file, units[start : start + size], top_k)
        sigma[start : start + size, : mine.sigma.shape[1]] = mine.sigma
        for other in range(start, n, size):
            theirs = mine if other == start else directions(file, units[other : other + size], top_k)
            for name, values in _all_pairs(mine, theirs, top_k).items():
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
        "group_i": [units[x].group for x in i.tolist()],
        "group_j": [units[x].group for x in j.tolist()],
        "name_i": [units[x].name for x in i.tolist()],
        "name_j": [units[x].name for x in j.tolist()],
        **_divergences(sigma, lengths, i, j),
        **{name: values[i, j] for name, values in overlaps.items()},
    }


def _all_pairs(x: Directions, y: Directions, top_k: int | None) -> dict[str, Array]:
    """Measures of every unit of ``x`` with every one of ``y`` (n, m), or half of them if these are the same."""
    n, m = len(x.rank), len(y.rank)
    most = max(1, _PRODUCTS // (4 * x.sigma.shape[1] * y.sigma.shape[1] * m))
    step = min(most, -(-n // 8)) if x is y else most
    found: dict[str, Array] = {}
    for start in range(0, n, step):
        first = start if x is y else 0
        rows, cols = x.part(slice(start, start + step)), y.part(slice(first, None))
        inner_out, inner_in = inner_products(rows.left, cols.left), inner_products(rows.right, cols.right)
        pair = (slice(None), None), (None, slice(None))
        for name, values in _measures(rows, cols, pair, inner_out, inner_in, top_k).items():
            found.setdefault(name, np.full((n, m), np.nan))[start : start + step, first:] = values
    return found


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


class _Acting(NamedTuple):
    """The units that act in one layer of a place."""

    total: Matrix
    units: Sequence[Matrix]


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
                    found.setdefault(key, []).append(_Acting(total, units))
    return found


def _between_scales(file: TensorFile, layers: Sequence[_Acting], top_k: int | None) -> Columns:
    """Rows of the table of scales: all layers at one place."""
    update = layers[0].total.update
    most = max(held(unit, top_k) for layer in layers for unit in layer.units)
    size = max(1, _HELD // (16 * most * (update.rows + update.cols)))
    blocks = [_scales_block(file, layers[start : start + size], top_k) for start in range(0, len(layers), size)]
    return {
        name: values if isinstance(values, str) else [v for block in blocks for v in block[name]]
        for name, values in blocks[0].items()
    }


def _scales_block(file: TensorFile, layers: Sequence[_Acting], top_k: int | None) -> Columns:
    units = list(dict.fromkeys(unit for layer in layers for unit in layer.units))
    number = {unit: x for x, unit in enumerate(units)}
    both = [
        (layer.total, first, second)
        for layer in layers
        for x, first in enumerate(layer.units)
        for second in layer.units[x + 1 :]
    ]
    i, j = (np.array([number[pair[side]] for pair in both]) for side in (1, 2))
    known = directions(file, units, top_k)
    inner_out = known.left[i] @ known.left[j].transpose(0, 2, 1)
    inner_in = known.right[i] @ known.right[j].transpose(0, 2, 1)
    return {
        "module": both[0][0].module,
        "group": [total.group for total, _, _ in both],
        "name": [total.name for total, _, _ in both],
        **{f"scale_{side}": [pair[x].scale for pair in both] for x, side in ((1, "i"), (2, "j"))},
        **{f"group_{side}": [pair[x].group for pair in both] for x, side in ((1, "i"), (2, "j"))},
        **{f"name_{side}": [pair[x].name for pair in both] for x, side in ((1, "i"), (2, "j"))},
        **_divergences(known.sigma, known.lengths, i, j),
        **_measures(known, known, (i, j), inner_out, inner_in, top_k),
    }
