"""What a finding is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.tables import labels
from msplora_analysis.tables.columns import KEYS

if TYPE_CHECKING:
    import pandas as pd

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


Check = Callable[[Evidence], Iterator[Finding]]


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
    given = pd.DataFrame(rows, columns=list(COLUMNS))
    table = given.astype(COLUMNS).where(given.notna())  # pandas 2 makes the text "None" of a missing one
    table["epoch"] = table["epoch"].astype("Int64") if (table["epoch"].dropna() % 1 == 0).all() else table["epoch"]
    order = table["severity"].map(SEVERITIES.index).sort_values(kind="stable").index
    return table.loc[order].reset_index(drop=True)


def when(place: Mapping[str, object]) -> str:
    """'epoch 3', 'step 100', or 'the only checkpoint'."""
    return labels.when(place, "the only checkpoint")
