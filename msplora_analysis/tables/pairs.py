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
task_...: the same of the leading task directions, where adapters have moments (see docs/metrics.md).
All are empty for an update of zero. Overlaps and cosines are exact to 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.adapters.moments import have_moments
from msplora_analysis.compute.pairs import measure
from msplora_analysis.compute.results import Columns, Redundancy
from msplora_analysis.compute.tasks import compute_each
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Execution, Options, Progress

if TYPE_CHECKING:
    import pandas as pd

_WHEN = {"run": "str", "step": "Int64", "epoch": "Float64"}
MEASURES = ("kl_ij", "kl_ji", "js", "wasserstein", "overlap_in", "overlap_out", "overlap_expected", "cosine")
_FLOATS = dict.fromkeys(MEASURES, "float64")
_UNITS = {"group_i": "Int64", "group_j": "Int64"}
PAIRS = _WHEN | {"scale": "str", "module": "str"} | _UNITS | _FLOATS
SCALES = (
    _WHEN | {"module": "str", "group": "Int64", "name": "str", "scale_i": "str", "scale_j": "str"} | _UNITS | _FLOATS
)
PAIRS_TASK = dict.fromkeys(("task_overlap_in", "task_overlap_out", "task_overlap_expected"), "float64")
SCALES_TASK = dict.fromkeys(("task_overlap_in", "task_overlap_out", "task_cosine"), "float64")
DETAILS = {
    "name_i": "str", "name_j": "str", "k": "Int64", "expected_in": "float64", "expected_out": "float64",
    "deviation_in": "float64", "deviation_out": "float64",
}  # fmt: skip
"""Columns after these with ``details``: places, K, and chance on either side with its standard deviation."""


class Tables(NamedTuple):
    """Both tables of the same adapters."""

    pairs: pd.DataFrame
    scales: pd.DataFrame


def load_pairs(
    paths: StrPath | Iterable[StrPath],
    *,
    details: bool = False,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    base: StrPath | None = None,
    top_k: int | None = None,
    moments: StrPath | None = None,
    workers: int | None = 1,
    dask: str | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What two layers share: one row per unordered pair of layers (or mid groups) within run, step, scale and module.

    The arguments are those of :func:`load_redundancy`.

    Returns:
        Columns run, step, epoch, scale, module, group_i, group_j (group_i first in the file's order of layers), kl_ij,
        kl_ji, js, wasserstein, overlap_in, overlap_out, overlap_expected, cosine (see docs/redundancy.md).

    Raises:
        AnalysisError: the input cannot be used as given.

    Example:
        >>> pairs = ma.load_pairs("runs/cola")
        >>> pairs.groupby(["run", "module"])["overlap_in"].mean()
    """
    options = Options(ignore_unknown, semantics, base, top_k, moments)
    execution = Execution(workers, dask, progress=progress)
    return read_redundancy(paths, options, execution, details=details).pairs


def load_scale_pairs(
    paths: StrPath | Iterable[StrPath],
    *,
    details: bool = False,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    base: StrPath | None = None,
    top_k: int | None = None,
    moments: StrPath | None = None,
    workers: int | None = 1,
    dask: str | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What two scales of MSPLoRA share: one row per layer and two scales that act in it; none for other methods.

    The arguments are those of :func:`load_redundancy`.

    Returns:
        Columns run, step, epoch, module, group (the layer), name, scale_i, scale_j, group_i, group_j (the unit of
        either scale), then the measures of :func:`load_pairs`.

    Raises:
        AnalysisError: the input cannot be used as given.

    Example:
        >>> scales = ma.load_scale_pairs("runs/msplora")
        >>> scales.groupby(["scale_i", "scale_j"])["cosine"].mean()
    """
    options = Options(ignore_unknown, semantics, base, top_k, moments)
    execution = Execution(workers, dask, progress=progress)
    return read_redundancy(paths, options, execution, details=details).scales


def load_redundancy(
    paths: StrPath | Iterable[StrPath],
    *,
    details: bool = False,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    base: StrPath | None = None,
    top_k: int | None = None,
    moments: StrPath | None = None,
    workers: int | None = 1,
    dask: str | None = None,
    progress: Progress | None = None,
) -> Tables:
    """Both tables, reading every adapter once. Keywords that are not listed are those of :func:`load_tables`.

    Args:
        paths: What :func:`load_tables` takes.
        details: Add the columns of ``DETAILS``.
        top_k: Most directions to compare (and to compute of a large matrix without factors).

    Returns:
        The tables of :func:`load_pairs` and :func:`load_scale_pairs`.

    Raises:
        AnalysisError: the input cannot be used as given.

    Example:
        >>> pairs, scales = ma.load_redundancy("runs/msplora", details=True)
    """
    options = Options(ignore_unknown, semantics, base, top_k, moments)
    execution = Execution(workers, dask, progress=progress)
    return read_redundancy(paths, options, execution, details=details)


def read_redundancy(
    paths: StrPath | Iterable[StrPath], options: Options, execution: Execution, *, details: bool, say: bool = True
) -> Tables:
    """:func:`load_redundancy`, for options in hand."""
    adapters = discover(paths, full=options.base is not None)
    return redundancy_of(adapters, options, execution, details=details, say=say)


def redundancy_of(
    adapters: Sequence[Adapter], options: Options, execution: Execution, *, details: bool = False, say: bool = True
) -> Tables:
    """Both tables of adapters that are found already.

    Args:
        say: Warn of what the tables must be read with; it need not be said again where spectra were read before.
    """
    from msplora_analysis.tables.load import Warnings, succeeding

    said = Warnings()
    found: list[Redundancy] = []
    for result in succeeding(compute_each(measure, adapters, options, execution)):
        said.hear(result)
        found.append(result)
    if say:
        said.give()
    extra = DETAILS if details else {}
    of_pairs, of_scales = (PAIRS_TASK, SCALES_TASK) if have_moments(adapters, options) else ({}, {})
    return Tables(
        table_of([(r.adapter, block) for r in found for block in r.pairs], PAIRS | of_pairs | extra),
        table_of([(r.adapter, block) for r in found for block in r.scales], SCALES | of_scales | extra),
    )


def table_of(blocks: Sequence[tuple[Adapter, Columns]], types: dict[str, str]) -> pd.DataFrame:
    """Rows of several adapters, as columns of these types."""
    import pandas as pd

    from msplora_analysis.tables.files import with_whole_epochs

    lengths = [len(block["cosine"]) for _, block in blocks]
    columns = {}
    for name, kind in types.items():
        values = [getattr(adapter, name) if name in _WHEN else block.get(name, np.nan) for adapter, block in blocks]
        cells = [v if isinstance(v, (np.ndarray, list)) else [v] * n for v, n in zip(values, lengths, strict=True)]
        if kind == "float64":
            columns[name] = pd.Series(np.concatenate([np.empty(0), *cells]), dtype=kind)
        else:
            columns[name] = pd.Series([cell for part in cells for cell in part], dtype=kind)
    return with_whole_epochs(pd.DataFrame(columns))
