"""What is computed of one adapter, as plain data that travels between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.errors import AnalysisError


class Row(NamedTuple):
    """One matrix: its keys in the tables, its shape, and the rank of its factors.

    ``frobenius``: norm of the matrix, where only its largest singular values are known.
    """

    scale: str
    group: int | None
    module: str
    name: str
    rows: int
    cols: int
    rank: int
    frobenius: float | None = None


class Spectra(NamedTuple):
    """All matrices of an adapter, and the singular values (descending) of each.

    ``unknown``: tensor names that were left out. ``notes``: what a reader must know of the adapter.
    """

    adapter: Adapter
    rows: Sequence[Row]
    sigma: Sequence[NDArray[np.floating[Any]]]
    unknown: Sequence[str]
    notes: Sequence[str]

    def joined(self, others: Sequence[Spectra]) -> Spectra:
        """With the matrices of further parts of the same adapter."""
        if not others:
            return self
        parts = (self, *others)
        return self._replace(
            rows=[row for part in parts for row in part.rows],
            sigma=[values for part in parts for values in part.sigma],
            notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
        )


class Failure(NamedTuple):
    """An adapter that cannot be read, and why; ``not_finite``: because it holds NaN or Inf."""

    adapter: Adapter
    message: str
    not_finite: bool = False
    arguments: tuple[str, ...] = ()

    @property
    def error(self) -> AnalysisError:
        return AnalysisError(self.message, *self.arguments)


Result = Spectra | Failure
