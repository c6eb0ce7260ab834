"""What is computed of one adapter, as plain data that travels between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import State


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

    ``unknown``: tensor names that were left out. ``notes``: what a reader must know of the adapter. ``files``: the
    states of all local files that they come from. ``built_in``: whether a format of this package read them. ``task``:
    the task-weighted singular values of each matrix, none of one that moments do not serve; empty without moments.
    """

    adapter: Adapter
    rows: Sequence[Row]
    sigma: Sequence[NDArray[np.floating[Any]]]
    unknown: Sequence[str]
    notes: Sequence[str]
    files: frozenset[State] = frozenset()
    built_in: bool = True
    task: Sequence[NDArray[np.floating[Any]]] = ()


Columns = dict[str, Any]  # column -> values, or one value for all rows


class Redundancy(NamedTuple):
    """Rows of both tables of what an adapter's updates share, in blocks; the other fields as in Spectra."""

    adapter: Adapter
    pairs: Sequence[Columns]
    scales: Sequence[Columns]
    unknown: Sequence[str]
    notes: Sequence[str]
    files: frozenset[State] = frozenset()


T = TypeVar("T", Spectra, Redundancy)


def joined(parts: Sequence[T]) -> T:
    """One result from those of the parts of an adapter, in order."""
    first = parts[0]
    of_parts = [name for name in first._fields if name not in ("adapter", "unknown", "files", "built_in")]
    together: dict[str, Any] = {name: [value for part in parts for value in getattr(part, name)] for name in of_parts}
    return first._replace(**together | {"notes": list(dict.fromkeys(together["notes"]))})


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
