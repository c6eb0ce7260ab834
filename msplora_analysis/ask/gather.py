"""All that a report shows, each file read and each table computed once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.ask.findings import diagnose
from msplora_analysis.ask.findings.base import Broken, Matrices
from msplora_analysis.ask.findings.base import gather as gather_matrices
from msplora_analysis.ask.findings.load import newest, told_apart
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Execution, Options
from msplora_analysis.tables.gather import gather_redundancy
from msplora_analysis.tables.load import gather_spectra, spectra_of, table_at, tables_of
from msplora_analysis.tables.pair_means import last_checkpoints
from msplora_analysis.tables.pairs import Tables as Redundancy
from msplora_analysis.tables.pairs import redundancy_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Gathered:
    """What is known of the runs.

    paths: as given. adapters: what was read; none of runs that come from tables. spectra: the tidy table. matrices: the
    same, one row per matrix. pairs, scales: the tables of ``redundancy`` with details, at the last checkpoint of each
    run. findings: the table of ``diagnose``. notes: what the numbers must be read with.
    """

    paths: Sequence[str]
    adapters: Sequence[Adapter]
    spectra: pd.DataFrame
    matrices: Matrices
    pairs: pd.DataFrame
    scales: pd.DataFrame
    findings: pd.DataFrame
    broken: Sequence[Broken] = ()
    notes: Sequence[str] = field(default=())

    @property
    def runs(self) -> list[str]:
        """Names of all runs with a matrix, in natural order."""
        return list(dict.fromkeys(self.matrices.keys["run"]))


def gather(paths: Sequence[StrPath], options: Options, execution: Execution) -> Gathered:
    """Read the adapters and tables at ``paths``. For errors see ``show.report.report``."""
    import pandas as pd

    tables = [path for path in paths if table_at(path) is not None]
    others = [path for path in paths if table_at(path) is None]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        read = _adapters(others, options, execution) if others else _nothing()
        adapters, broken, spectra, metrics, redundancy = read
        if tables:
            stored = gather_spectra(tables, options, execution)
            if shared := sorted(set(stored["run"]) & set(spectra["run"])):
                raise AnalysisError(
                    f"{tables[0]}: run {shared[0]} is also in {others[0]}; give the run folders, or the table, alone"
                )
            spectra = pd.concat([table for table in (spectra, stored) if len(table)], ignore_index=True)
            beside = gather_redundancy(tables, options, execution)
            redundancy = Redundancy(*(_joined(*both) for both in zip(redundancy, beside, strict=True)))
    for warning in caught:
        warnings.warn(str(warning.message), category=warning.category, stacklevel=2)
    if spectra.empty:
        file = f"{adapters[0].file}: " if adapters else ""
        raise AnalysisError(
            broken[0].message if broken else f"{file}no low-rank factors in this or any other file; give other paths"
        )
    found = diagnose(
        spectra, metrics if len(metrics) else None, redundancy.pairs, scales=redundancy.scales, broken=broken
    )
    return Gathered(
        [str(path) for path in paths],
        adapters,
        spectra,
        gather_matrices(spectra, metrics if len(metrics) else None),
        last_checkpoints(redundancy.pairs),
        last_checkpoints(redundancy.scales),
        found,
        broken,
        [str(warning.message) for warning in caught],
    )


_Read = tuple[list[Adapter], list[Broken], "pd.DataFrame", "pd.DataFrame", Redundancy]


def _adapters(paths: Sequence[StrPath], options: Options, execution: Execution) -> _Read:
    """Adapters with their spectra and metrics tables; those that hold NaN or Inf are told apart, not refused."""
    adapters = discover(paths)
    good, broken = told_apart(spectra_of(adapters, options, execution))
    spectra, metrics = tables_of([result.adapter for result in good], good, (1,))
    latest = newest([result.adapter for result in good])
    redundancy = redundancy_of(latest, options, replace(execution, progress=None), details=True, say=False)
    return adapters, broken, spectra, metrics, redundancy


def _nothing() -> _Read:
    spectra, metrics = tables_of([], [], (1,))
    return [], [], spectra, metrics, redundancy_of([], Options(), Execution(), details=True)


def _joined(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    return pd.concat([table for table in (first, second) if len(table)] or [first], ignore_index=True)
