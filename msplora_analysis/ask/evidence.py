"""What is known of runs, from their files or from tables: what findings, the report and ``watch`` look at."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.compute.results import Result, Spectra
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import NO_MOMENTS, Execution, Options
from msplora_analysis.tables.against_base import measure
from msplora_analysis.tables.checkpoints import last_checkpoints, newest, times
from msplora_analysis.tables.columns import KEYS
from msplora_analysis.tables.gather import gather_redundancy, gather_spectra, joined, table_at
from msplora_analysis.tables.load import spectra_of, tables_of
from msplora_analysis.tables.matrices import Matrices, as_keys, pivot
from msplora_analysis.tables.pairs import redundancy_of

_NO_MATRICES = Matrices(as_keys(pd.DataFrame(columns=list(KEYS))).assign(rank=0), np.zeros((0, 1)))


class Broken(NamedTuple):
    """A checkpoint that holds NaN or Inf, and so is not in the tables."""

    run: str
    step: int | None
    epoch: float | None
    message: str


@dataclass(frozen=True)
class Evidence:
    """All that is known of some runs. What is empty was not computed.

    Args:
        spectra, metrics: The tidy tables.
        pairs, scales: The tables of ``load_redundancy``.
        relative: Updates beside the weights they change: the table of ``tables.against_base``.
        broken: Checkpoints that hold NaN or Inf.
        adapters: What was read; none of runs that come from tables.
        options: How the adapters were read.
        notes: What the numbers must be read with.
    """

    spectra: pd.DataFrame
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    pairs: pd.DataFrame = field(default_factory=pd.DataFrame)
    scales: pd.DataFrame = field(default_factory=pd.DataFrame)
    relative: pd.DataFrame = field(default_factory=pd.DataFrame)
    broken: Sequence[Broken] = ()
    adapters: Sequence[Adapter] = ()
    options: Options = field(default_factory=Options)
    notes: Sequence[str] = ()

    @cached_property
    def matrices(self) -> Matrices:
        """The spectra, one row per matrix.

        ``keys`` has all numbers as float64, and the columns ``rank``, ``rows`` and ``cols`` (NaN without the metrics),
        ``time`` (0, 1, ... over the checkpoints of a run) and ``last`` (of its run's last checkpoint). A run's adapters
        without step and epoch are left out where it has others.

        Raises:
            AnalysisError: ``spectra`` is no spectra table.
        """
        keys, sigma, task = pivot(self.spectra) if len(self.spectra) else _NO_MATRICES
        keys = keys.astype({"group": "float64"})
        if len(self.metrics):
            shapes = as_keys(self.metrics).astype({"group": "float64"})
            shapes[["rows", "cols"]] = self.metrics[["rows", "cols"]].astype("float64")
            keys = keys.merge(shapes, how="left", on=list(KEYS))
        else:
            keys[["rows", "cols"]] = np.nan
        dated = keys["step"].notna() | keys["epoch"].notna()
        kept = Matrices(keys, sigma, task).where(dated | ~dated.groupby(keys["run"]).transform("any"))
        kept.keys["time"] = times(kept.keys).fillna(0).astype("int64")
        kept.keys["last"] = kept.keys["time"] == kept.keys.groupby("run")["time"].transform("max")
        return kept

    @property
    def runs(self) -> list[str]:
        """Names of all runs with a matrix, in natural order."""
        return list(dict.fromkeys(self.matrices.keys["run"]))


def of_tables(
    spectra: pd.DataFrame,
    metrics: pd.DataFrame | None = None,
    pairs: pd.DataFrame | None = None,
    scales: pd.DataFrame | None = None,
) -> Evidence:
    """The evidence in tables; all but the first may be left out."""
    metrics, pairs, scales = (pd.DataFrame() if table is None else table for table in (metrics, pairs, scales))
    return Evidence(spectra, metrics, pairs, scales)


def gather(
    paths: Sequence[StrPath], options: Options, execution: Execution, *, model: StrPath | None = None
) -> Evidence:
    """Read the adapters, and the tables written before, at and under ``paths``; each file once.

    Args:
        paths: What ``load_tables`` takes, and what ``tables.gather.gather_spectra`` takes as a table.
        model: The model that was trained, to compare the updates with its weights.

    Returns:
        Pairs and scales are those of the last readable checkpoint of each run.

    Raises:
        AnalysisError: the input cannot be used. A file with NaN or Inf is no error, but ``broken``.
    """
    tables = [path for path in paths if table_at(path) is not None]
    others = [path for path in paths if table_at(path) is None]
    if model is not None and tables and not others:
        raise AnalysisError(f"base={model}: {tables[0]} is a table, without the updates; give the run folders", "base")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        adapters = discover(others, full=options.base is not None) if others or not tables else []
        found = of_results(spectra_of(adapters, options, execution), options, execution, model=model)
        if tables:
            stored = gather_spectra(tables, options, execution)
            if shared := sorted(set(stored["run"]) & set(found.spectra["run"])):
                raise AnalysisError(
                    f"{tables[0]}: run {shared[0]} is also in {others[0]}; give the run folders, or the table, alone"
                )
            known = [table for table in (found.spectra, stored) if len(table)]
            beside = gather_redundancy(tables, options, execution)
            pairs, scales = (
                joined([of_adapters, last_checkpoints(of_tables)])
                for of_adapters, of_tables in zip((found.pairs, found.scales), beside, strict=True)
            )
            found = replace(found, spectra=pd.concat(known, ignore_index=True), pairs=pairs, scales=scales)
    for warning in caught:
        warnings.warn(str(warning.message), category=warning.category, stacklevel=2)
    return replace(found, adapters=adapters, options=options, notes=[str(warning.message) for warning in caught])


def of_results(
    results: Iterable[Result], options: Options, execution: Execution, *, model: StrPath | None = None
) -> Evidence:
    """The evidence in what was computed of adapters.

    Layers, scales and weights are compared at the last readable checkpoint of each run, if its file is still there.

    Args:
        results: In order within each run.
        options: How the adapters were read.
        model: The model that was trained, to compare the updates with its weights.

    Raises:
        AnalysisError: an adapter could not be read for another reason than NaN or Inf.
    """
    good: list[Spectra] = []
    broken: list[Broken] = []
    for result in results:
        if isinstance(result, Spectra):
            good.append(result)
        elif result.not_finite:
            broken.append(Broken(result.adapter.run, result.adapter.step, result.adapter.epoch, result.message))
        else:
            raise AnalysisError(result.message)
    adapters = [result.adapter for result in good]
    spectra, metrics = tables_of(adapters, good, (1,), any(result.task for result in good))
    latest = [adapter for adapter in newest(adapters) if adapter.file.is_file()]
    plain, quietly = replace(options, moments=NO_MOMENTS), replace(execution, progress=None)
    pairs, scales = redundancy_of(latest, plain, quietly, details=True, say=False)
    relative = pd.DataFrame()
    if model is not None and latest:
        relative = measure(latest, Path(model), options, execution.progress)
    return Evidence(spectra, metrics, pairs, scales, relative, broken)
