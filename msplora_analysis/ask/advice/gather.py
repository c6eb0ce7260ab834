"""From paths to advice: the last checkpoint of each run, with the moments and the ablation beside it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.adapters.moments import have_moments, moments_file, open_moments
from msplora_analysis.ask.advice.advise import RunAdvice, advise
from msplora_analysis.ask.advice.subject import Subject
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
    from msplora_core.moments import Moments


def advise_all(paths: Sequence[StrPath], options: Options, execution: Execution) -> list[RunAdvice]:
    """Advice on the last checkpoint of each run at and under ``paths``.

    Raises:
        AnalysisError: the input cannot be used as given.
    """
    checkpoints = discover(paths)
    latest = newest(checkpoints)
    last = set(map(id, latest))
    measured = [one for one in checkpoints if id(one) in last or _has_own_moments(one, options)]
    states = [_states(adapter, options) for adapter in measured]  # the files are opened more than once
    results = list(succeeding(spectra_of(measured, options, execution)))
    spectra, metrics = tables_of(measured, results, (1,), have_moments(measured, options))
    found = [_advice(adapter, checkpoints, spectra, metrics, options) for adapter in latest]
    for before in states:
        check_unchanged(before)
    return found


def _has_own_moments(adapter: Adapter, options: Options) -> bool:
    """Whether moments stand beside it; a file that was named is of the last checkpoint alone."""
    return options.moments is None and moments_file(adapter, options) is not None


def _states(adapter: Adapter, options: Options) -> dict[Path, State]:
    """What the local files are now that advice on an adapter comes from."""
    files = (adapter.file, moments_file(adapter, options), _ablation_file(adapter))
    return {file: state_of(file) for file in files if isinstance(file, Path) and file.exists()}


def advise_known(evidence: Evidence) -> list[RunAdvice]:
    """Advice on the last readable checkpoint of each run whose adapter is known; tables alone have none.

    Args:
        evidence: What was read.
    """
    return [
        _advice(adapter, evidence.adapters, evidence.spectra, evidence.metrics, evidence.options)
        for adapter in readable(evidence)
    ]


def readable(evidence: Evidence) -> list[Adapter]:
    """The last checkpoint of each run, where it is in the tables."""
    tables = (evidence.spectra, evidence.metrics)
    return [one for one in newest(evidence.adapters) if all(of_adapter(table, one).any() for table in tables)]


def of_adapter(table: pd.DataFrame, adapter: Adapter) -> pd.Series[bool]:
    """Which rows of a tidy table are those of an adapter."""
    known = table["run"] == adapter.run
    for name, value in (("step", adapter.step), ("epoch", adapter.epoch)):
        known &= table[name].isna() if value is None else (table[name] == value).fillna(False)
    return known.astype(bool)


def moments_of(adapter: Adapter, options: Options) -> Moments | None:
    """Its moments with their scores, if there are any."""
    path = moments_file(adapter, options)
    return None if path is None else open_moments(path, {}, scores=("plain", "task", "scale_plain", "scale_task"))


def _advice(
    adapter: Adapter, checkpoints: Sequence[Adapter], spectra: pd.DataFrame, metrics: pd.DataFrame, options: Options
) -> RunAdvice:
    own = [one for one in checkpoints if one.run == adapter.run]
    of_run = metrics[metrics["run"] == adapter.run]
    return advise(
        Subject(
            adapter,
            spectra[of_adapter(spectra, adapter)],
            of_run[of_adapter(of_run, adapter)],
            moments_of(adapter, options),
            ablation_of(adapter),
            own,
            of_run if options.moments is None else pd.DataFrame(),
        )
    )


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
