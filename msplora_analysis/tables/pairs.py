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

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.compute.pairs import Columns, Redundancy, measure
from msplora_analysis.compute.tasks import Progress, compute_each
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Options

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
    workers: int | None = 1,
    dask: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tables:
    """Both tables, reading every adapter once.

    top_k: most directions to compare (and to compute of a large matrix without factors).
    details: add the columns of ``DETAILS``.
    workers, dask, progress: see ``load_tables``.
    options: further fields of ``options.Options``.

    Raises AnalysisError for input that cannot be used as given.
    """
    reading = Options(top_k=top_k, **options)
    adapters = discover(paths, full=reading.base is not None)
    return redundancy_of(adapters, reading, details=details, workers=workers, dask=dask, progress=progress)


def redundancy_of(
    adapters: Sequence[Adapter],
    options: Options,
    *,
    details: bool = False,
    workers: int | None = 1,
    dask: str | None = None,
    progress: Progress | None = None,
    say: bool = True,
) -> Tables:
    """Both tables of adapters that are found already.

    say: warn of what the tables must be read with; it need not be said again where spectra were read before.
    """
    from msplora_analysis.tables.load import Warnings, succeeding

    said = Warnings()
    found: list[Redundancy] = []
    results: Any = compute_each(measure, adapters, options, workers=workers, dask=dask, progress=progress)
    for result in succeeding(results):
        said.hear(result)
        found.append(result)  # type: ignore[arg-type]
    if say:
        said.give()
    extra = DETAILS if details else {}
    return Tables(
        table_of([(r.adapter, block) for r in found for block in r.pairs], {**PAIRS, **extra}),
        table_of([(r.adapter, block) for r in found for block in r.scales], {**SCALES, **extra}),
    )


def table_of(blocks: Sequence[tuple[Adapter, Columns]], types: dict[str, str]) -> pd.DataFrame:
    """Rows of several adapters, as columns of these types."""
    import pandas as pd

    from msplora_analysis.tables.files import with_whole_epochs

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
