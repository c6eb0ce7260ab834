"""Evidence from adapter files: everything that ``diagnose`` takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msplora_analysis.engine.compute import Progress
from msplora_analysis.engine.results import Failure, Spectra
from msplora_analysis.errors import AnalysisError
from msplora_analysis.findings.base import Broken
from msplora_analysis.options import Options
from msplora_analysis.sources.discovery import Adapter, StrPath, discover

if TYPE_CHECKING:
    import pandas as pd

_NOT_FINITE = ("holds NaN or Inf", "exceed float64")  # what the readers say of such a file


def load_findings(
    paths: StrPath | Iterable[StrPath],
    *,
    base: StrPath | None = None,
    workers: int | None = None,
    cache: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The findings (see ``diagnose``) of the adapters at and under ``paths``.

    base: the model that was trained, to compare the updates with its weights. Layers, scales and
    weights are compared at the last readable checkpoint of each run.
    workers, cache, progress: as in ``load_tables``. options: fields of ``options.Options``.

    Raises AnalysisError for input that cannot be used; a file with NaN or Inf is a finding.
    """
    from msplora_analysis.findings import diagnose
    from msplora_analysis.findings.against_base import measure
    from msplora_analysis.redundancy.load import redundancy_of
    from msplora_analysis.tables.load import spectra_of, tables_of

    adapters = discover(paths)
    reading = Options(**options)
    good: list[Spectra] = []
    broken: list[Broken] = []
    for result in spectra_of(adapters, reading, workers, cache=cache, progress=progress):
        if isinstance(result, Spectra):
            good.append(result)
        else:
            broken.append(_broken(result))
    spectra, metrics = tables_of([result.adapter for result in good], good, (1,))
    latest = _latest([result.adapter for result in good])
    pairs, scales = None, None
    if latest:
        pairs, scales = redundancy_of(latest, reading, details=True, workers=workers, say=False)
    relative = measure(latest, Path(base), reading, progress) if base is not None and latest else None
    return diagnose(spectra, metrics, pairs, scales=scales, relative=relative, broken=broken)


def _broken(failure: Failure) -> Broken:
    if not any(text in failure.message for text in _NOT_FINITE):
        raise AnalysisError(failure.message)
    return Broken(failure.adapter.run, failure.adapter.step, failure.adapter.epoch, failure.message)


def _latest(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The last checkpoint of each run; one without step and epoch only where there is no other."""
    latest: dict[str, Adapter] = {}
    for adapter in adapters:  # in order within each run, those without step and epoch last
        if adapter.run not in latest or adapter.step is not None or adapter.epoch is not None:
            latest[adapter.run] = adapter
    return list(latest.values())
