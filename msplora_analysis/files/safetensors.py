"""Read safetensors files with numpy alone.

The safetensors layout (huggingface.co/docs/safetensors): an 8-byte little-endian header length,
a JSON header ``{name: {dtype, shape, data_offsets}}``, then the raw little-endian data, which the
tensors cover without gap or overlap. A header is checked in full before any data is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, open_binary
from msplora_analysis.files.narrow import NARROW, widened
from msplora_analysis.files.tensors import MOST_AXES, FloatArray, Shape, TensorFile, check_name, state_of

# The safetensors library takes 100 MB. A tensor needs 100 bytes or so, and an adapter of every expert of the largest
# models has fewer than 200,000; parsed, the worst header takes twenty times its size.
_MAX_HEADER = 32 * 2**20
_KEPT_HEADER = 2**20  # bytes: a larger one is not worth the memory
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_READABLE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
_READABLE_ALONE = {"I64": "<i8", "I32": "<i4"}  # one number: some programs write alpha so


class _Entry(NamedTuple):
    dtype: str
    shape: Shape
    begin: int  # bytes from the start of the data
    end: int


class _Header(NamedTuple):
    """Shared by all files with the same header: not to be changed."""

    entries: dict[str, _Entry]
    shapes: dict[str, Shape]
    metadata: dict[str, str]


class _Malformed(ValueError):
    """What is wrong with a header."""


class SafetensorsFile(TensorFile):
    """A safetensors file. A tensor is read when it is asked for, so memory stays flat."""

    def __init__(self, path: Place) -> None:
        self.path = path
        self._file = open_binary(path)
        try:
            self.states = {path: state_of(self._file.fileno())} if isinstance(path, Path) else {}
            self._data, header = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self._entries, self.shapes, self.metadata = header
        self._prefetched: dict[str, int] = {}  # where a tensor begins in the window
        self._window = np.empty(0, dtype=np.uint8)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def prefetch(self, names: Iterable[str]) -> None:
        wanted = sorted({name: self._entries[name] for name in names}.items(), key=lambda item: item[1].begin)
        runs: list[list[int]] = []  # begin, end: tensors that lie side by side are read at once
        self._prefetched = {}
        position = 0
        for name, entry in wanted:
            if runs and runs[-1][1] == entry.begin:
                runs[-1][1] = entry.end
            else:
                runs.append([entry.begin, entry.end])
            self._prefetched[name] = position
            position += entry.end - entry.begin
        if len(self._window) < position:
            self._window = np.empty(position, dtype=np.uint8)
        target = self._window.data
        for begin, end in runs:
            self._read_into(target[: end - begin], self._data + begin)
            target = target[end - begin :]

    def read_part(self, name: str, begin: int, end: int) -> FloatArray:
        entry = self._entries[name]
        if entry.dtype not in _READABLE:
            return super().read_part(name, begin, end)
        size = _BITS[entry.dtype] // 8
        begin, end = (min(at * size, entry.end - entry.begin) for at in (begin, end))
        raw = np.empty(end - begin, dtype=np.uint8)
        self._read_into(raw.data, self._data + entry.begin + begin)
        values = raw.view(_READABLE[entry.dtype])
        return widened(values, entry.dtype) if entry.dtype in NARROW else values

    def read_indices(self, name: str) -> NDArray[np.int64]:
        entry = self._entries[name]
        if entry.dtype not in _READABLE_ALONE:
            raise AnalysisError(
                f"{self.path}: tensor {name} is of type {entry.dtype}; expected one of {', '.join(_READABLE_ALONE)}"
            )
        raw = np.empty(entry.end - entry.begin, dtype=np.uint8)
        self._read_into(raw.data, self._data + entry.begin)
        return raw.view(_READABLE_ALONE[entry.dtype]).astype(np.int64).reshape(entry.shape)

    def read(self, name: str) -> FloatArray:
        entry = self._entries[name]
        kind = _READABLE.get(entry.dtype)
        if kind is None and math.prod(entry.shape) == 1:
            kind = _READABLE_ALONE.get(entry.dtype)
        if kind is None:
            raise AnalysisError(
                f"{self.path}: tensor {name} is of type {entry.dtype}; expected one of {', '.join(_READABLE)}"
            )
        size = entry.end - entry.begin
        if name in self._prefetched:
            start = self._prefetched[name]
            raw = self._window[start : start + size]
        else:
            raw = np.empty(size, dtype=np.uint8)
            self._read_into(raw.data, self._data + entry.begin)
        values = raw.view(kind)
        if entry.dtype in NARROW:
            values = widened(values, entry.dtype)
        return values.reshape(entry.shape)

    def _read_into(self, target: memoryview, offset: int) -> None:
        try:
            self._file.seek(offset)
            done = 0
            while done < len(target):
                step = self._file.readinto(target[done:])
                if not step:
                    raise self._error("the file ends early: it is truncated")
                done += step
        except OSError as error:
            raise AnalysisError(f"{self.path}: cannot be read: {error.strerror}") from None

    def _read_header(self) -> tuple[int, _Header]:
        """Where the data starts, and what the header says of it."""
        size = self._file.seek(0, 2)
        length = bytearray(8)
        if size < 8:
            raise self._error(f"the file has {size} bytes, a header alone takes more")
        self._read_into(memoryview(length), 0)
        header_size = int.from_bytes(length, "little")
        if header_size > size - 8:
            raise self._error(f"its header claims {header_size} bytes of a file of {size}")
        if header_size > _MAX_HEADER:
            raise AnalysisError(f"{self.path}: its header has {header_size} bytes; expected at most {_MAX_HEADER}")
        text = bytearray(header_size)
        self._read_into(memoryview(text), 8)
        parse = _parse if header_size < _KEPT_HEADER else _parse.__wrapped__
        try:
            header = parse(bytes(text), size - 8 - header_size)
        except _Malformed as error:
            raise self._error(str(error)) from None
        return 8 + header_size, header

    def _error(self, what: str) -> AnalysisError:
        return AnalysisError(f"{self.path}: not a complete safetensors file: {what}; save or copy it again")


@lru_cache(maxsize=2)
def _parse(text: bytes, size: int) -> _Header:
    """What a header says of ``size`` bytes of data. The checkpoints of a run have one and the same."""
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"its header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise _Malformed("its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Malformed("its __metadata__ is not an object of strings")
    entries = {name: _entry(name, value) for name, value in header.items()}

    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != position:
            raise _Malformed(f"tensor {name} starts at byte {entry.begin}, not {position}")
        position = entry.end
    if position != size:
        start = 8 + len(text)
        raise _Malformed(f"it has {start + size} bytes where its header describes {start + position}")
    return _Header(entries, {name: entry.shape for name, entry in entries.items()}, metadata)


def _entry(name: str, value: Any) -> _Entry:
    try:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, *offsets]
        begin, end = offsets
    except (TypeError, KeyError, ValueError):
        raise _Malformed(f"the header entry of tensor {name} is malformed") from None
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise _Malformed(f"tensor {name} has shape {shape} and offsets {offsets}")
    # What numpy cannot make an array of, which an axis of length 0 would hide below.
    if len(shape) > MOST_AXES or math.prod(n or 1 for n in shape) >= 2**59:
        raise _Malformed(f"tensor {name} has shape {shape}, which is too large")
    if fault := check_name(name):
        raise _Malformed(fault)
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _Malformed(f"tensor {name} is of unknown type {dtype!r}")
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _Malformed(f"tensor {name} of type {dtype} and shape {shape} cannot take {end - begin} bytes")
    return _Entry(dtype, tuple(shape), begin, end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result
