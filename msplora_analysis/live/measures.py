"""A few numbers that tell how an adapter stands: means over its matrices, by scale.

    spectra/<scale>/effective_rank, .../m_eff_<k>      of updates that are not zero
    spectra/<scale>/frobenius                          norms of the updates, with the factor alpha/r
    spectra/overlap/<scale>-<scale>_in, ..._out        part of the directions that two scales of a layer share

Scales are global, mid and layer, and total: the whole update of a layer; a method without scales has layer alone. The
measures are those of the registry that are shown live, and overlap_in and overlap_out of the pairs table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from msplora_analysis.compute.linalg.directions import TOLERANCE, singular_directions
from msplora_analysis.compute.linalg.spectra import Array, adapter_spectra, singular_values
from msplora_analysis.compute.linalg.truncated import Spectrum
from msplora_analysis.compute.measures.overlap import subspace_overlap
from msplora_analysis.compute.measures.registry import columns, measures
from msplora_analysis.formats import read_contents
from msplora_analysis.formats.updates import Matrix, Product, Sum
from msplora_analysis.live.model import ModelTensors
from msplora_analysis.live.reduction import alike, can_be_reduced, slices, small_factors
from msplora_analysis.options import NO_MOMENTS, Options
from msplora_core.names import TOTAL

PREFIX = "spectra"
_OPTIONS = Options(ignore_unknown=True, moments=NO_MOMENTS)


class Directions(NamedTuple):
    """Of n updates: sigma (n, r) and singular directions, rows of left and right (n, r, R)."""

    sigma: Array
    left: Array
    right: Array


def adapter_values(
    tensors: ModelTensors, config: dict[str, Any], *, ks: Sequence[int] = (1, 4), by_module: bool = False
) -> tuple[dict[str, float], list[str]]:
    """The values of the module's docstring, of one adapter, without those that do not exist.

    Args:
        tensors: Those of the adapter.
        config: Its configuration, as adapter_config.json holds it.
        ks: The k of M_eff-k.
        by_module: Also for every module type, as ``spectra/<scale>/<module>/...``.

    Returns:
        Value by name, and the tensors that no format explains.

    Raises:
        AnalysisError: For a format that is not supported, and for NaN or Inf in a tensor.
    """
    contents = read_contents(config, tensors, _OPTIONS)
    spectra, overlaps = _spectra_and_overlaps(tensors, contents.matrices)
    table = columns(measures("live", ks), [one.sigma for one in spectra], [one.frobenius for one in spectra])
    groups: dict[str, list[int]] = {}
    for i, matrix in enumerate(contents.matrices):
        groups.setdefault(matrix.scale, []).append(i)
        if by_module:
            groups.setdefault(f"{matrix.scale}/{matrix.module}", []).append(i)
    found = {f"{group}/{name}": column[rows] for group, rows in groups.items() for name, column in table.items()}
    found |= {f"overlap/{name}": np.array(shared) for name, shared in overlaps.items()}
    known = {name: column[~np.isnan(column)] for name, column in found.items()}  # an update of zero has no ratios
    values = {f"{PREFIX}/{name}": float(column.mean()) for name, column in known.items() if len(column)}
    return values, contents.unknown


def _spectra_and_overlaps(
    tensors: ModelTensors, matrices: Sequence[Matrix]
) -> tuple[list[Spectrum], dict[str, list[float]]]:
    """The spectrum of each matrix, and what every two scales of each layer share, by name.

    A total needs the inner products of its scales' factors: the spectra of these and what they share come from them.
    """
    sums = {i: m.update for i, m in enumerate(matrices) if isinstance(m.update, Sum) and can_be_reduced(m.update)}
    owners: dict[Product, int] = {}
    for i, matrix in enumerate(matrices):
        if matrix.scale != TOTAL and isinstance(matrix.update, Sum):
            owners |= dict.fromkeys(matrix.update.products, i)
    # Total -> the matrices of its scales
    scales = {i: [owners[p] for p in update.products] for i, update in sums.items() if matrices[i].scale == TOTAL}
    within = {i for of_total in scales.values() for i in of_total}
    sigma: dict[int, Array] = {}
    overlaps: dict[str, list[float]] = {}
    for block in alike(tensors, {i: update for i, update in sums.items() if i not in within}):
        a, b = small_factors(tensors, [matrices[i] for i in block])
        sigma |= zip(block, singular_values(a, b), strict=True)
        totals = [scales[i] for i in block if i in scales]
        if totals and len(totals[0]) == 1:
            sigma |= {scales[i][0]: sigma[i] for i in block if i in scales}
        elif totals:
            members = list(zip(*totals, strict=True))  # of each scale, its matrix in every layer
            parts = slices(sums[block[0]])
            known = [_directions(a[:, p], b[:, :, p], of) for p, of in zip(parts, members, strict=True)]
            for of_scale, of in zip(known, members, strict=True):
                sigma |= zip(of, of_scale.sigma, strict=True)
            names = [matrices[i].scale for i in totals[0]]
            for name, shared in _overlaps(dict(zip(names, known, strict=True))):
                overlaps.setdefault(name, []).extend(shared.tolist())
    rest = [i for i in range(len(matrices)) if i not in sigma]
    others = dict(zip(rest, adapter_spectra(tensors, [matrices[i] for i in rest]), strict=True))
    return [Spectrum(sigma[i]) if i in sigma else others[i] for i in range(len(matrices))], overlaps


def _directions(a: Array, b: Array, owners: Sequence[int]) -> Directions:
    """``singular_directions`` of n products b[i] @ a[i], once where layers share one, as ``owners`` (n) tell.

    What layers share comes first in their totals, and so has the same coordinates in all of them (Cholesky's factor of
    the leading rows does not depend on those that follow).
    """
    same = list(map(owners.index, owners))
    for i, j in enumerate(same):
        if not (np.array_equal(a[i], a[j]) and np.array_equal(b[i], b[j])):  # no Cholesky factor
            same[i] = i
    first, of_layer = np.unique(same, return_inverse=True)
    return Directions(*(each[of_layer] for each in singular_directions(a[first], b[first])))


def _overlaps(scales: Mapping[str, Directions]) -> Iterable[tuple[str, Array]]:
    """Name -> (n,): the overlap of every two scales of n layers, on either side; NaN for an update of zero."""
    for (one, x), (other, y) in combinations(scales.items(), 2):
        rank = np.minimum(*((z.sigma > TOLERANCE * z.sigma[:, :1]).sum(axis=1) for z in (x, y)))
        for side, u, v in (("in", x.right, y.right), ("out", x.left, y.left)):
            yield f"{one}-{other}_{side}", subspace_overlap(u @ v.transpose(0, 2, 1), rank)
