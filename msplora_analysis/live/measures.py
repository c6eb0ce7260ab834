"""A few numbers that tell how an adapter stands: means over its matrices, by scale.

    spectra/<scale>/effective_rank, .../m_eff_<k>      of updates that are not zero
    spectra/<scale>/frobenius                          norms of the updates, with the factor alpha/r
    spectra/overlap/<scale>-<scale>_in, ..._out        part of the directions that two scales of a layer share

Scales are global, mid and layer, and total: the whole update of a layer; a method without scales has layer alone. The
measures are those of the tables (``measures.metrics``, and overlap_in and overlap_out of ``redundancy``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from msplora_analysis.compute.linalg.directions import TOLERANCE, singular_directions
from msplora_analysis.compute.linalg.spectra import Array, Spectrum, adapter_spectra, singular_values
from msplora_analysis.compute.measures import metrics
from msplora_analysis.compute.measures.overlap import subspace_overlap
from msplora_analysis.formats import Matrix, Product, Sum, read_contents
from msplora_analysis.live.model import ModelTensors
from msplora_analysis.live.reduction import alike, can_be_reduced, slices, small_factors
from msplora_analysis.options import Options

PREFIX = "spectra"
_OPTIONS = Options(ignore_unknown=True)


class Values(NamedTuple):
    """Values by name, without those that do not exist; and tensors that no format explains."""

    values: dict[str, float]
    unknown: list[str]


def adapter_values(
    tensors: ModelTensors, config: dict[str, Any], *, ks: Sequence[int] = (1, 4), by_module: bool = False
) -> Values:
    """The values of the module's docstring, of one adapter.

    by_module: also for every module type, as ``spectra/<scale>/<module>/...``. Raises AnalysisError for a format that
    is not supported, and for NaN or Inf in a tensor.
    """
    contents = read_contents(config, tensors, _OPTIONS)
    overlaps: dict[str, list[float]] = {}
    spectra = _spectra(tensors, contents.matrices, overlaps)
    columns = _columns(spectra, ks)
    groups: dict[str, list[int]] = {}
    for i, matrix in enumerate(contents.matrices):
        groups.setdefault(matrix.scale, []).append(i)
        if by_module:
            groups.setdefault(f"{matrix.scale}/{matrix.module}", []).append(i)
    values: dict[str, float] = {}
    for group, rows in groups.items():
        for name, column in columns.items():
            _put(values, f"{PREFIX}/{group}/{name}", column[rows])
    for name, shared in overlaps.items():
        _put(values, f"{PREFIX}/overlap/{name}", shared)
    return Values(values, contents.unknown)


def _columns(spectra: Sequence[Spectrum], ks: Iterable[int]) -> dict[str, Array]:
    padded = np.zeros((len(spectra), max((len(found.sigma) for found in spectra), default=1)))
    for row, found in zip(padded, spectra, strict=True):
        row[: len(found.sigma)] = found.sigma
    columns: dict[str, Array] = {"effective_rank": metrics.effective_rank(padded)}
    columns |= {f"m_eff_{k}": metrics.m_eff(padded, k) for k in ks}
    columns["frobenius"] = metrics.frobenius(padded)
    for i, found in enumerate(spectra):
        if found.frobenius is not None:  # the other measures need all singular values
            for name, column in columns.items():
                column[i] = found.frobenius if name == "frobenius" else np.nan
    return columns


def _spectra(tensors: ModelTensors, matrices: Sequence[Matrix], overlaps: dict[str, list[float]]) -> list[Spectrum]:
    """The spectrum of each matrix; overlaps of the scales of each layer are added to ``overlaps``.

    Those of the parts of a total, and what these share, come from the inner products that the total needs anyway.
    """
    found: dict[int, Spectrum] = {}
    owners: dict[Product, int] = {}
    for i, matrix in enumerate(matrices):
        if matrix.scale != "total" and isinstance(matrix.update, Sum):
            owners.update(dict.fromkeys(matrix.update.products, i))
    sums = {i: m.update for i, m in enumerate(matrices) if isinstance(m.update, Sum) and can_be_reduced(m.update)}
    parts = {owners.get(p) for i, update in sums.items() if matrices[i].scale == "total" for p in update.products}
    for block in alike(tensors, {i: update for i, update in sums.items() if i not in parts}):
        a, b = small_factors(tensors, [matrices[i] for i in block])
        for i, sigma in zip(block, singular_values(a, b), strict=True):
            found[i] = Spectrum(sigma)
        units = [[owners[product] for product in sums[i].products] for i in block if matrices[i].scale == "total"]
        if units and len(units[0]) > 1:
            _add_overlaps(a, b, sums[block[0]], units, matrices, found, overlaps)
        elif units:
            found |= {unit: found[i] for i, (unit,) in zip(block, units, strict=True)}
    rest = [i for i in range(len(matrices)) if i not in found]
    found |= dict(zip(rest, adapter_spectra(tensors, [matrices[i] for i in rest]), strict=True))
    return [found[i] for i in range(len(matrices))]


def _add_overlaps(
    a: Array,
    b: Array,
    first: Sum,
    units: Sequence[Sequence[int]],
    matrices: Sequence[Matrix],
    found: dict[int, Spectrum],
    overlaps: dict[str, list[float]],
) -> None:
    """Spectra of the parts ``units`` of n totals that are like ``first``, and what every two of them share.

    a, b: (n, R, R), small factors of the totals, scaled.
    """
    known = [_directions(a[:, part], b[:, :, part]) for part in slices(first)]
    for (sigma, _, _), of_part in zip(known, zip(*units, strict=True), strict=True):
        found |= {unit: Spectrum(values) for unit, values in zip(of_part, sigma, strict=True)}
    ranks = [(sigma > TOLERANCE * sigma[:, :1]).sum(axis=1) for sigma, _, _ in known]
    for i in range(len(known)):
        for j in range(i + 1, len(known)):
            scales = "-".join(matrices[units[0][x]].scale for x in (i, j))
            for side, name in ((2, "in"), (1, "out")):
                inner = known[i][side] @ known[j][side].transpose(0, 2, 1)
                overlap = subspace_overlap(inner, np.minimum(ranks[i], ranks[j]))
                overlaps.setdefault(f"{scales}_{name}", []).extend(overlap.tolist())


def _directions(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """``singular_directions``, of every different product once.

    What layers share comes first in their totals, and so has the same coordinates in all of them (Cholesky's factor of
    the leading rows does not depend on those that follow).
    """
    keys = [x.tobytes() + y.tobytes() for x, y in zip(a, b, strict=True)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    first = [keys.index(key) for key in numbers]
    of_layer = [numbers[key] for key in keys]
    sigma, left, right = singular_directions(a[first], b[first])
    return sigma[of_layer], left[of_layer], right[of_layer]


def _put(values: dict[str, float], name: str, column: Iterable[float] | Array) -> None:
    """The mean of those that exist, if any does: an update of zero has no ratios."""
    known = np.asarray(column, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known):
        values[name] = float(known.mean())
