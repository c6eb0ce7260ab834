"""The tables of any mix of adapters and of tables that were written before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from msplora_analysis.adapters.layouts import WEIGHTS_SUFFIXES
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath, parse, walk
from msplora_analysis.options import NO_MOMENTS, Execution, Options
from msplora_analysis.tables.ablation import ablations_at, load_ablation
from msplora_analysis.tables.files import FORMATS, read_spectra, read_table, typed, with_whole_epochs
from msplora_analysis.tables.load import read_tables
from msplora_analysis.tables.pairs import (
    DETAILS,
    PAIRS,
    PAIRS_TASK,
    SCALES,
    SCALES_TASK,
    Tables,
    read_redundancy,
    table_of,
)
from msplora_core.names import ABLATION


def gather_spectra(paths: Sequence[StrPath], options: Options, execution: Execution) -> pd.DataFrame:
    """One spectra table from any mix of adapters and of tables written before.

    A path that is a .parquet or .csv file, or a folder with spectra.parquet or spectra.csv at its
    top, is read as a table; all others as ``load_spectra`` does.

    Raises:
        AnalysisError: the input cannot be used, or two of these hold a run of the same name.
    """
    files = {path: table_at(path) for path in paths}
    adapters = [path for path, file in files.items() if file is None]
    sources = {str(file): read_spectra(file) for file in files.values() if file is not None}
    if adapters:
        sources[", ".join(map(str, adapters))] = read_tables(adapters, options, execution).spectra
    owners: dict[str, str] = {}
    for source, table in sources.items():
        for run in table["run"].unique():
            if owners.setdefault(run, source) != source:
                raise AnalysisError(
                    f"{source}: run {run} is also in {owners[run]}; give the run folders together "
                    "instead, so that each gets its own name"
                )
    return typed(pd.concat(sources.values(), ignore_index=True))


def gather_redundancy(paths: Sequence[StrPath], options: Options, execution: Execution) -> Tables:
    """Both tables of redundancy, for the paths that ``gather_spectra`` takes, with the columns of ``DETAILS``.

    For a table of spectra, or its folder, those that ``msplora-analyze redundancy`` wrote beside it are read, if they
    are there. Adapters are compared, but nothing is said that reading their spectra says.
    """
    files = {path: table_at(path) for path in paths}
    stored = [(stored_pairs(file, "pairs"), stored_pairs(file, "scales")) for file in files.values() if file]
    found = [
        Tables(table_of([], PAIRS) if pairs is None else pairs, table_of([], SCALES) if scales is None else scales)
        for pairs, scales in stored
    ]
    if adapters := [path for path, file in files.items() if file is None]:
        plain = replace(options, moments=NO_MOMENTS)
        found.append(read_redundancy(adapters, plain, execution, details=True, say=False))
    return Tables(*(joined(of_kind) for of_kind in zip(*found, strict=True)))


def gather_ablations(paths: Sequence[StrPath]) -> tuple[pd.DataFrame | None, list[StrPath]]:
    """The ablations at and under the paths, None if there are none; and the paths that hold adapters or tables too.

    Raises:
        AnalysisError: an ablation is broken.
    """
    others = []
    for given in paths:
        place = parse(given)
        if isinstance(place, Path) and place.is_dir() and table_at(given) is None and any(ablations_at([given])):
            names = (name for folder in walk(place, set()) for name in folder.files)
            if not any(name.endswith(WEIGHTS_SUFFIXES) for name in names):
                continue
        elif place.name.startswith(f"{ABLATION}."):
            continue
        others.append(given)
    found = list(ablations_at(paths))
    return (load_ablation(found) if found else None), others


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of pairs, or of scales, as one."""
    known = [table for table in tables if len(table)] or tables[:1]
    return with_whole_epochs(pd.concat(known, ignore_index=True))


def table_at(given: StrPath) -> Path | None:
    """The spectra table that a local path is or has at its top."""
    path = parse(given)
    if not isinstance(path, Path):
        return None
    if path.suffix in (".parquet", ".csv") and not path.is_dir():
        return path
    candidates = [path / f"spectra.{suffix}" for suffix in FORMATS]
    return next((file for file in candidates if file.is_file()), None)


def stored_pairs(spectra: Path, name: str) -> pd.DataFrame | None:
    """The table that ``msplora-analyze redundancy`` wrote beside a table of spectra; None if there is none.

    Args:
        spectra: The file of the spectra.
        name: "pairs" or "scales".

    Raises:
        AnalysisError: the file is something else.
    """
    candidates = [spectra.parent / f"{name}.{suffix}" for suffix in FORMATS]
    if (file := next((file for file in candidates if file.is_file()), None)) is None:
        return None
    types, task = (PAIRS, PAIRS_TASK) if name == "pairs" else (SCALES, SCALES_TASK)
    # The columns of DETAILS are there with --details alone.
    return read_table(file, types, f"table of {name}", "one of `msplora-analyze redundancy`", more=DETAILS | task)
