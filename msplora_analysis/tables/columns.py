"""From results to the columns of the two tidy tables, a batch of adapters at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.compute.measures.metrics import effective_rank, frobenius
from msplora_analysis.compute.measures.registry import columns, measures
from msplora_analysis.compute.results import Row, Spectra
from msplora_core.version import __version__

# The key columns of every table, and their types in pandas. epoch is Int64 where all are whole numbers.
KEYS = {
    "run": "str",
    "step": "Int64",
    "epoch": "Float64",
    "scale": "str",
    "group": "Int64",
    "module": "str",
    "name": "str",
}
VALUES = {"k": "int64", "sigma": "float64"}
TASK = {"task_sigma": "float64"}  # of the spectra table where an adapter has moments
TASK_MEASURES = {"task_norm": frobenius, "task_effective_rank": effective_rank}  # of the metrics table there

_BATCH = 2**16  # singular values from which on a batch is given out


class Batch(NamedTuple):
    """The same adapters in both tables."""

    spectra: pa.RecordBatch
    metrics: pa.RecordBatch


class Columns:
    """Makes batches. What all of them must agree on is known before the first adapter is read.

    ks: the k of the columns m_eff_<k>. task: whether there are columns of task-weighted spectra.
    """

    def __init__(self, adapters: Sequence[Adapter], ks: Iterable[int], task: bool = False) -> None:
        self.ks = sorted(set(ks))
        self._has_task = task
        self._types = dict(KEYS)
        if all(adapter.epoch is None or isinstance(adapter.epoch, int) for adapter in adapters):
            self._types["epoch"] = "Int64"

    def batches(self, results: Iterable[Spectra]) -> Iterator[Batch]:
        """Batches of whole adapters, in the order of the results."""
        held: list[Spectra] = []
        values = 0
        for result in results:
            if result.rows:
                held.append(result)
                values += sum(map(len, result.sigma))
            if values >= _BATCH:
                yield self._batch(held)
                held, values = [], 0
        if held:
            yield self._batch(held)

    def _batch(self, results: Sequence[Spectra]) -> Batch:
        rows = [row for result in results for row in result.rows]
        sigma = [values for result in results for values in result.sigma]
        lengths = np.array([len(values) for values in sigma])
        once = np.ones_like(lengths)
        k = np.arange(1, lengths.sum() + 1) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        values, of_matrices = {"k": k, "sigma": np.concatenate(sigma)}, self._measures(rows, sigma)
        if self._has_task:
            task = [known for result in results for known in result.task or [np.empty(0)] * len(result.rows)]
            both = zip(task, lengths.tolist(), strict=True)
            values["task_sigma"] = np.concatenate([of if len(of) else np.full(n, np.nan) for of, n in both])
            of_matrices |= task_measures(task)
        return Batch(
            _record_batch(self._keys(results, rows, lengths), values, self._types),
            _record_batch(self._keys(results, rows, once), of_matrices, self._types),
        )

    def _keys(self, results: Sequence[Spectra], rows: Sequence[Row], repeats: NDArray[Any]) -> dict[str, pa.Array]:
        """The key columns, in which each matrix has ``repeats`` rows."""
        of_adapter = [(r.adapter.run, r.adapter.step, r.adapter.epoch) for r in results for _ in r.rows]
        of_matrix = [(row.scale, row.group, row.module, row.name) for row in rows]
        keys = zip(KEYS, [*zip(*of_adapter, strict=True), *zip(*of_matrix, strict=True)], strict=True)
        return {name: _MAKERS[self._types[name]](column, repeats) for name, column in keys}

    def _measures(self, rows: Sequence[Row], sigma: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The value columns of the metrics table, one entry per matrix."""
        shape = ("rows", "cols", "rank")
        return {
            **{name: np.array([getattr(row, name) for row in rows], dtype=np.int64) for name in shape},
            **columns(measures("metrics", self.ks), sigma, [row.frobenius for row in rows]),
        }


def task_measures(task: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Measures of task-weighted singular values, descending; NaN of a matrix without."""
    padded = np.zeros((len(task), max([1, *map(len, task)])))
    for values, row in zip(task, padded, strict=True):
        row[: len(values)] = values
    known = np.array([len(values) > 0 and values[0] == values[0] for values in task], dtype=bool)
    padded[~known] = 0
    return {name: np.where(known, function(padded), np.nan) for name, function in TASK_MEASURES.items()}


# pa.array would import pandas, to ask whether it is given something of pandas, and pyarrow.compute: 0.35 s, which makes
# `spectra` take 1.3 times as long on the case S of benchmarks/, 1.4 times on M.


def _texts(values: Sequence[str], repeats: NDArray[Any]) -> pa.Array:
    encoded = [value.encode() for value in values]
    lengths = np.repeat([len(text) for text in encoded], repeats)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    data = b"".join(text * count for text, count in zip(encoded, repeats.tolist(), strict=True))
    return pa.Array.from_buffers(pa.string(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _whole_numbers(values: Sequence[int | None], repeats: NDArray[Any]) -> pa.Array:
    present = np.array([value is not None for value in values], dtype=bool)
    numbers = np.array([value or 0 for value in values], dtype=np.int64)
    return _numbers(np.repeat(numbers, repeats), np.repeat(present, repeats))


def _floats(values: Sequence[float | None], repeats: NDArray[Any]) -> pa.Array:
    numbers = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return _numbers(np.repeat(numbers, repeats))


def _numbers(values: NDArray[Any], present: NDArray[np.bool_] | None = None) -> pa.Array:
    """An Arrow array of numbers; what is not present, or is NaN, is an empty cell, as pandas writes it."""
    values = np.ascontiguousarray(values)
    if present is None and values.dtype.kind == "f":
        present = ~np.isnan(values)
    empty = 0 if present is None else int((~present).sum())
    valid = pa.py_buffer(np.packbits(present, bitorder="little")) if present is not None and empty else None
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(values)], null_count=empty)


_MAKERS: dict[str, Callable[[Any, Any], pa.Array]] = {"str": _texts, "Int64": _whole_numbers, "Float64": _floats}


def _record_batch(keys: dict[str, pa.Array], values: dict[str, Any], types: dict[str, str]) -> pa.RecordBatch:
    arrays = {**keys, **{name: _numbers(column) for name, column in values.items()}}
    numpy_types = {**types, **{name: str(column.dtype) for name, column in values.items()}}
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
    return batch.replace_schema_metadata(
        {"pandas": json.dumps(_pandas_metadata(numpy_types)), "msplora_analysis": __version__}
    )


def _pandas_metadata(types: dict[str, str]) -> dict[str, Any]:
    """What lets pandas give each column its type back: an Int64 with empty cells is no float."""
    columns = [
        {
            "name": name,
            "field_name": name,
            "pandas_type": "unicode" if kind == "str" else kind.lower(),
            "numpy_type": kind,
            "metadata": None,
        }
        for name, kind in types.items()
    ]
    return {"index_columns": [], "column_indexes": [], "columns": columns, "pandas_version": "2.2.0"}
