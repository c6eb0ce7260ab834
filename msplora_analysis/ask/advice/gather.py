"""From paths to advice: the last checkpoint of each run, with the moments and the ablation beside it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.adapters.moments import moments_file, open_moments
from msplora_analysis.ask.advice.advise import RunAdvice, Subject, advise
from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.files.addresses import StrPath, read_json
from msplora_analysis.files.tensors import State, check_unchanged, state_of
from msplora_analysis.options import Execution, Options
from msplora_analysis.tables.ablation import load_ablation
from msplora_analysis.tables.checkpoints import newest
from msplora_analysis.tables.files import FORMATS
from msplora_analysis.tables.load import spectra_of, succeeding, tables_of
from msplora_core.names import ABLATION

if TYPE_CHECKING:
    import pandas as pd


def advise_all(paths: Sequence[StrPath], options: Options, execution: Execution) -> list[RunAdvice]:
    """Advice on the last checkpoint of each run at and under ``paths``.

    Raises:
        AnalysisError: the input cannot be used as given.
    """
    adapters = newest(discover(paths))
    states = [_states(adapter, options) for adapter in adapters]  # the files are opened more than once
    found = []
    results = succeeding(spectra_of(adapters, options, execution))
    for adapter, result, before in zip(adapters, results, states, strict=True):
        tables = tables_of([adapter], [result], (1,), moments_file(adapter, options) is not None)
        found.append(_advice(adapter, *tables, options))
        check_unchanged(before)
    return found


def _states(adapter: Adapter, options: Options) -> dict[Path, State]:
    """What the local files are now that advice on an adapter comes from."""
    files = (adapter.file, moments_file(adapter, options), _ablation_file(adapter))
    return {file: state_of(file) for file in files if isinstance(file, Path) and file.exists()}


def advise_known(evidence: Evidence, options: Options) -> list[RunAdvice]:
    """Advice on the last readable checkpoint of each run whose adapter is known; tables alone have none.

    Args:
        evidence: What was read.
        options: How the adapters were read.
    """
    found = []
    for adapter in newest(evidence.adapters):
        spectra, metrics = (table[_is_of(table, adapter)] for table in (evidence.spectra, evidence.metrics))
        if not spectra.empty and not metrics.empty:
            found.append(_advice(adapter, spectra, metrics, options))
    return found


def _is_of(table: pd.DataFrame, adapter: Adapter) -> pd.Series[bool]:
    known = table["run"] == adapter.run
    for name, value in (("step", adapter.step), ("epoch", adapter.epoch)):
        known &= table[name].isna() if value is None else (table[name] == value).fillna(False)
    return known.astype(bool)


def _advice(adapter: Adapter, spectra: pd.DataFrame, metrics: pd.DataFrame, options: Options) -> RunAdvice:
    path = moments_file(adapter, options)
    bases = ("plain", "task", "scale_plain", "scale_task")
    moments = None if path is None else open_moments(path, {}, scores=bases)
    return advise(Subject(adapter, spectra, metrics, moments, ablation_of(adapter)))


def ablation_of(adapter: Adapter) -> pd.DataFrame | None:
    """The ablation beside a local adapter; None, with a warning, if it is of other weights.

    Raises:
        AnalysisError: the table is something else.
    """
    if (file := _ablation_file(adapter)) is None or not isinstance(adapter.file, Path):
        return None
    beside = file.with_suffix(".json")
    told = read_json(beside).get("weights_sha256") if beside.is_file() else None
    if told is not None and told != hashlib.sha256(adapter.file.read_bytes()).hexdigest():
        warnings.warn(f"{file} is of other weights than {adapter.file}: left out; measure it anew", stacklevel=2)
        return None
    return load_ablation(file)


def _ablation_file(adapter: Adapter) -> Path | None:
    folder = adapter.file.parent
    if not isinstance(folder, Path):
        return None
    files = (folder / f"{ABLATION}.{suffix}" for suffix in FORMATS)
    return next((file for file in files if file.is_file()), None)
