"""Evidence from adapter files: everything that ``diagnose`` takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.ask.findings.base import Broken
from msplora_analysis.compute.results import Result, Spectra
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Execution, Options

if TYPE_CHECKING:
    import pandas as pd


def load_findings(
    paths: StrPath | Iterable[StrPath],
    options: Options,
    execution: Execution,
    base: StrPath | None = None,
) -> pd.DataFrame:
    """The findings (see ``diagnose``) of the adapters at and under ``paths``.

    base: the model that was trained, to compare the updates with its weights. Layers, scales and
    weights are compared at the last readable checkpoint of each run.

    Raises AnalysisError for input that cannot be used; a file with NaN or Inf is a finding.
    """
    from msplora_analysis.ask.findings import diagnose
    from msplora_analysis.ask.findings.against_base import measure
    from msplora_analysis.tables.load import spectra_of, tables_of
    from msplora_analysis.tables.pairs import redundancy_of

    good, broken = told_apart(spectra_of(discover(paths), options, execution))
    spectra, metrics = tables_of([result.adapter for result in good], good, (1,))
    latest = newest([result.adapter for result in good])
    pairs, scales = None, None
    if latest:
        pairs, scales = redundancy_of(latest, options, replace(execution, progress=None), details=True, say=False)
    relative = measure(latest, Path(base), options, execution.progress) if base is not None and latest else None
    return diagnose(spectra, metrics, pairs, scales=scales, relative=relative, broken=broken)


def told_apart(results: Iterable[Result]) -> tuple[list[Spectra], list[Broken]]:
    """What could be computed, and the checkpoints that hold NaN or Inf.

    Raises AnalysisError for one that cannot be read for another reason.
    """
    good: list[Spectra] = []
    broken: list[Broken] = []
    for result in results:
        if isinstance(result, Spectra):
            good.append(result)
        elif result.not_finite:
            adapter = result.adapter
            broken.append(Broken(adapter.run, adapter.step, adapter.epoch, result.message))
        else:
            raise AnalysisError(result.message)
    return good, broken


def newest(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The last checkpoint of each run; one without step and epoch only where there is no other."""
    latest: dict[str, Adapter] = {}
    for adapter in adapters:  # in order within each run, those without step and epoch last
        if adapter.run not in latest or adapter.step is not None or adapter.epoch is not None:
            latest[adapter.run] = adapter
    return list(latest.values())
