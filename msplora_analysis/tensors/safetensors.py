"""Read safetensors files with numpy alone.

The safetensors layout (huggingface.co/docs/safetensors): an 8-byte little-endian header length,
a JSON header ``{name: {dtype, shape, data_offsets}}``, then the raw little-endian data, which the
tensors cover without gap or overlap. A header is checked in full before any data is read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msplora_analysis.errors import AnalysisError
from msplora_analysis.tensors import FloatArray, Shape

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_READABLE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class _Entry(NamedTuple):
    dtype: str
    shape: Shape
    begin: int  # bytes from the start of the data
    end: int


class SafetensorsFile:
    """A safetensors file, read tensor by tensor into one reused buffer, so memory stays flat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise AnalysisError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self._data, self._entries, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self.shapes: dict[str, Shape] = {name: e.shape for name, e in self._entries.items()}
        self._buffer = bytearray()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> FloatArray:
        entry = self._entries[name]
        if entry.dtype not in _READABLE:
            raise AnalysisError(
                f"{self.path}: tensor {name} is of type {entry.dtype}; expected one of {', '.join(_READABLE)}"
            )
        size = entry.end - entry.begin
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        self._read_into(memoryview(self._buffer)[:size], self._data + entry.begin)
        count = math.prod(entry.shape)
        values = np.frombuffer(self._buffer, dtype=_READABLE[entry.dtype], count=count)
        if entry.dtype == "BF16":  # the upper half of a float32
            values = np.left_shift(values, 16, dtype="<u4").view("<f4")
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

    def _read_header(self) -> tuple[int, dict[str, _Entry], dict[str, str]]:
        """Where the data starts, the entry of every tensor, and the metadata."""
        size = self._file.seek(0, 2)
        length = bytearray(8)
        if size < 8:
            raise self._error(f"the file has {size} bytes, a header alone takes more")
        self._read_into(memoryview(length), 0)
        header_size = int.from_bytes(length, "little")
        if header_size > min(_MAX_HEADER, size - 8):
            raise self._error(f"its header claims {header_size} bytes of a file of {size}")
        text = bytearray(header_size)
        self._read_into(memoryview(text), 8)
        try:
            header = json.loads(text.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._error(f"its header is not valid JSON: {error}") from None
        if not isinstance(header, dict):
            raise self._error("its header is not a JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._error("its __metadata__ is not an object of strings")
        entries = {name: self._entry(name, value) for name, value in header.items()}

        position = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
            if entry.begin != position:
                raise self._error(f"tensor {name} starts at byte {entry.begin}, not {position}")
            position = entry.end
        if 8 + header_size + position != size:
            raise self._error(f"it has {size} bytes where its header describes {8 + header_size + position}")
        return 8 + header_size, entries, metadata

    def _entry(self, name: str, value: Any) -> _Entry:
        try:
            dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
            numbers = [*shape, *offsets]
            begin, end = offsets
        except (TypeError, KeyError, ValueError):
            raise self._error(f"the header entry of tensor {name} is malformed") from None
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise self._error(f"tensor {name} has shape {shape} and offsets {offsets}")
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._error(f"tensor {name} is of unknown type {dtype!r}")
        if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise self._error(f"tensor {name} of type {dtype} and shape {shape} cannot take {end - begin} bytes")
        return _Entry(dtype, tuple(shape), begin, end)

    def _error(self, what: str) -> AnalysisError:
        return AnalysisError(f"{self.path}: not a complete safetensors file: {what}; save or copy it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result
