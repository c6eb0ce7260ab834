"""What a finding is, and the evidence that checks look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.tables.columns import KEYS

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]

SEVERITIES = ("error", "warning", "info")
COLUMNS = {
    "id": "str",
    "severity": "str",
    **KEYS,
    "value": "float64",
    "threshold": "float64",
    "evidence": "str",
    "source": "str",
    "advice": "str",
    "details": "str",
}


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    id: stable identifier. title: what is the case, in a few words. source: where the threshold comes
    from. advice: what to try.
    """

    id: str
    severity: str
    title: str
    source: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """One kind of finding at one place.

    place: key columns (run, step, ..., name), as far as they apply. value, threshold: the number that
    decided, and what it was held against. evidence: a sentence with the numbers. details: what else
    a program may use, as JSON values.
    """

    kind: Kind
    place: dict[str, Any]
    value: float
    threshold: float
    evidence: str
    severity: str | None = None  # if not that of the kind
    details: dict[str, Any] = field(default_factory=dict)


class Broken(NamedTuple):
    """A checkpoint that holds NaN or Inf."""

    run: str
    step: int | None
    epoch: float | None
    message: str


class Matrices(NamedTuple):
    """The spectra table, one row per matrix.

    keys: the key columns, and ``rank``, ``time`` (0, 1, ... over the checkpoints of a run), ``last``
    (of its run's last checkpoint). sigma: (n, R) in the same order, zeros beyond the rank.
    """

    keys: pd.DataFrame
    sigma: Array

    def where(self, chosen: Any) -> Matrices:
        """Those that a mask or indices choose."""
        chosen = np.asarray(chosen)
        rows = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Matrices(self.keys.iloc[rows].reset_index(drop=True), self.sigma[rows])

    def parts(self) -> Matrices:
        """Without the totals of layers that have several parts: what is wrong is in a part."""
        return self.where(self.keys["scale"] != "total")

    def groups(self, *by: str) -> Iterator[Matrices]:
        for index in self.keys.groupby(list(by), sort=False, dropna=False).indices.values():
            yield self.where(np.sort(index))

    def place(self, row: int) -> dict[str, Any]:
        """The key columns of one matrix."""
        return self.keys.iloc[row][list(KEYS)].to_dict()


@dataclass(frozen=True)
class Evidence:
    """All that checks look at; what is None was not computed.

    pairs: between layers, the table of ``redundancy``. scales: between the scales of a layer, with
    the columns scale_i, scale_j. relative: against the base model, the table of ``against_base``.
    """

    matrices: Matrices | None
    broken: tuple[Broken, ...] = ()
    pairs: pd.DataFrame | None = None
    scales: pd.DataFrame | None = None
    relative: pd.DataFrame | None = None


Check = Callable[[Evidence], Iterator[Finding]]


def gather(spectra: pd.DataFrame, metrics: pd.DataFrame | None = None) -> Matrices:
    """One row per matrix of the spectra table, with its ``rows`` and ``cols`` (NaN without the metrics table).

    A run's adapters without step and epoch (saved once more at the end) are left out where it has
    others. Raises AnalysisError for a table that is no spectra table.
    """
    if missing := [name for name in (*KEYS, "k", "sigma") if name not in spectra.columns]:
        raise AnalysisError(f"the spectra table lacks the column {', '.join(missing)}: pass what load_spectra returns")
    table = _plain(spectra)
    matrix = table.groupby(list(KEYS), dropna=False, sort=False).ngroup().to_numpy()
    k = table["k"].to_numpy(dtype=np.int64)
    n, width = (matrix.max() + 1, k.max()) if len(k) else (0, 1)
    sigma = np.zeros((n, width))
    sigma[matrix, k - 1] = table["sigma"].to_numpy(dtype=np.float64)
    keys = table.iloc[np.unique(matrix, return_index=True)[1]][list(KEYS)].reset_index(drop=True)
    keys["rank"] = np.bincount(matrix, minlength=n)
    keys[["rows", "cols"]] = np.nan
    if metrics is not None:
        shapes = _plain(metrics)[[*KEYS, "rows", "cols"]].astype({"rows": "float64", "cols": "float64"})
        keys = keys.drop(columns=["rows", "cols"]).merge(shapes, how="left", on=list(KEYS))
    dated = keys["step"].notna() | keys["epoch"].notna()
    kept = (dated | ~dated.groupby(keys["run"]).transform("any")).to_numpy()
    keys, sigma = keys[kept].reset_index(drop=True), sigma[kept]
    keys["time"] = _times(keys)
    keys["last"] = keys["time"] == keys.groupby("run")["time"].transform("max")
    return Matrices(keys, sigma)


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Key columns at types that compare and merge: numbers as float64, empty as NaN."""
    kinds = {name: kind if kind == "str" else "Float64" for name, kind in KEYS.items()}
    return table.astype(kinds).astype({name: kind.lower() for name, kind in kinds.items()})


def _times(keys: pd.DataFrame) -> pd.Series:
    when = keys["step"].where(keys["step"].groupby(keys["run"]).transform("count") > 0, keys["epoch"])
    return when.groupby(keys["run"]).rank(method="dense").fillna(1).astype("int64") - 1


def to_table(findings: Iterable[Finding]) -> pd.DataFrame:
    """Findings as a table, the most severe first, otherwise in the order of the checks."""
    import pandas as pd

    rows = [
        {
            "id": finding.kind.id,
            "severity": finding.severity or finding.kind.severity,
            **{name: finding.place.get(name) for name in KEYS},
            "value": finding.value,
            "threshold": finding.threshold,
            "evidence": finding.evidence,
            "source": finding.kind.source,
            "advice": finding.kind.advice,
            "details": json.dumps(finding.details) if finding.details else None,
        }
        for finding in findings
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    table["epoch"] = table["epoch"].astype("Int64") if (table["epoch"].dropna() % 1 == 0).all() else table["epoch"]
    order = table["severity"].map(SEVERITIES.index).sort_values(kind="stable").index
    return table.loc[order].reset_index(drop=True)


def when(place: dict[str, Any]) -> str:
    """'epoch 3', 'step 100', or 'the only checkpoint'."""
    for name in ("epoch", "step"):
        value = place.get(name)
        if value is not None and value == value:
            return f"{name} {value:g}"
    return "the only checkpoint"
