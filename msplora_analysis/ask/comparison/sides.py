"""The two sides of a comparison, from runs on disk or from tables written before."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.ask.comparison.compare import Side
from msplora_analysis.ask.comparison.pairing import units
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Execution, Options
from msplora_analysis.tables.files import FORMATS, read_spectra
from msplora_analysis.tables.load import read_tables
from msplora_analysis.tables.pairs import redundancy_of

if TYPE_CHECKING:
    import pandas as pd

_NEEDED = ("run", "step", "epoch", "scale", "group_i", "group_j", "overlap_in", "overlap_out", "overlap_expected")


def load_sides(
    a: Sequence[StrPath],
    b: Sequence[StrPath],
    method_a: str | None,
    method_b: str | None,
    options: Options,
    execution: Execution,
    *,
    epoch: float | None = None,
) -> tuple[Side, Side]:
    """Both sides: each either adapters, or one spectra table.

    method_a, method_b: keep the runs of this method (as figures call it). Layers' subspaces are
    compared for adapters, with the same number of directions on both sides; for a table if a pairs
    table lies beside it.
    """
    loaded = [_load(paths, method, options, execution) for paths, method in ((a, method_a), (b, method_b))]
    top_k = min(_rank(spectra) for spectra, _, _, _ in loaded)
    sides = []
    for spectra, adapters, stored, name in loaded:
        pairs = stored
        if adapters:
            chosen = _at(adapters, spectra, epoch)
            reading, quietly = replace(options, top_k=top_k), replace(execution, progress=None)
            pairs, _ = redundancy_of(chosen, reading, quietly, details=True, say=False)
        sides.append(Side(name, spectra, pairs, units(dict.fromkeys(spectra["run"]), adapters)))
    if (sides[0].pairs is None) != (sides[1].pairs is None):
        warnings.warn("subspaces are not compared: one of the two is a table without a pairs table", stacklevel=2)
    if sides[0].label == sides[1].label:
        sides = [
            Side(f"{s.label} ({_called(p)})", s.spectra, s.pairs, s.units) for s, p in zip(sides, (a, b), strict=True)
        ]
    return sides[0], sides[1]


def _load(
    paths: Sequence[StrPath], method: str | None, options: Options, execution: Execution
) -> tuple[pd.DataFrame, list[Adapter], pd.DataFrame | None, str]:
    """The spectra of one method, its adapters or its stored pairs, and its name."""
    from msplora_analysis.tables.matrices import prepare

    tables = [file for path in paths if (file := _table(Path(path), "spectra"))]
    if tables and len(paths) > 1:
        raise AnalysisError(f"{tables[0]}: a table cannot be joined with other paths; give it alone, or give the runs")
    adapters = [] if tables else discover(paths, full=options.base is not None)
    spectra = read_spectra(tables[0]) if tables else read_tables(paths, options, execution).spectra
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again when they are compared
        matrices = prepare(spectra)
    variants = matrices.drop_duplicates("run").set_index("run")["variant"]
    names = variants.unique().tolist()
    if method is None and len(names) > 1:
        raise AnalysisError(
            f"{paths[0]}: holds several methods; choose one with --method or --with-method: {', '.join(names)}"
        )
    if method is not None and method not in names:
        raise AnalysisError(f"{paths[0]}: holds no runs of {method!r}; there are {', '.join(names)}")
    name = method or names[0]
    runs = set(variants[variants == name].index)
    pairs = _stored_pairs(tables[0]) if tables else None
    return spectra[spectra["run"].isin(runs)], [x for x in adapters if x.run in runs], pairs, name


def _table(path: Path, name: str) -> Path | None:
    """The table that ``path`` is, or that lies in it as ``name``."""
    if path.suffix in (".parquet", ".csv") and not path.is_dir():
        return path
    return next((file for suffix in FORMATS if (file := path / f"{name}.{suffix}").is_file()), None)


def _stored_pairs(spectra: Path) -> pd.DataFrame | None:
    import pandas as pd

    if (file := _table(spectra.parent, "pairs")) is None:
        return None
    pairs = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    if missing := [name for name in _NEEDED if name not in pairs]:
        raise AnalysisError(f"{file}: not a pairs table: no column {', '.join(missing)}; make it again or move it away")
    return pairs


def _at(adapters: Sequence[Adapter], spectra: pd.DataFrame, epoch: float | None) -> list[Adapter]:
    """One adapter per run: that of the epoch, or else of the last that all runs have; without epochs the last step."""
    of_run: dict[str, dict[float | None, Adapter]] = {}
    for adapter in adapters:  # in order of steps: the last of an epoch counts
        of_run.setdefault(adapter.run, {})[adapter.epoch] = adapter
    shared = set.intersection(*(set(found) for found in of_run.values())) - {None}
    wanted = epoch if epoch is not None else max((e for e in shared if e is not None), default=None)
    return [found.get(wanted) or list(found.values())[-1] for found in of_run.values()]


def _rank(spectra: pd.DataFrame) -> int:
    """The least rank of a layer's part."""
    parts = spectra[spectra["scale"] == "layer"]
    return int(parts.groupby(["run", "step", "name"], dropna=False)["k"].max().min()) if len(parts) else 1


def _called(paths: Sequence[StrPath]) -> str:
    return Path(paths[0]).name or str(paths[0])
