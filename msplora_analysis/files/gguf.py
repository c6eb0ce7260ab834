"""Read GGUF files (github.com/ggml-org/ggml/blob/master/docs/gguf.md) with numpy alone.

Behind the magic number, a version and two counts come keys with values, then name, shape, type and place of every
tensor, then their data, aligned. Axes stand in reverse order. Of an adapter all but the data is small; of a whole
model (``general.type``) nothing more is read.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, open_binary
from msplora_analysis.files.narrow import widened
from msplora_analysis.files.tensors import FloatArray, Shape, TensorFile, check_name, state_of

_MOST_HEADER = 8 * 2**20  # bytes: an adapter has no vocabulary
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KINDS = {0: "<f4", 1: "<f2", 28: "<f8", 30: "<u2"}  # 30: bfloat16
_Q8, _Q8_VALUES = 8, 32
_Q8_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", _Q8_VALUES)])


class _Entry(NamedTuple):
    shape: Shape
    kind: int
    begin: int  # bytes from the start of the data


class _Malformed(ValueError):
    """What is wrong with a file."""


class GgufFile(TensorFile):
    """A GGUF file. A tensor is read when it is asked for."""

    def __init__(self, path: Place) -> None:
        self.path = path
        self._file = open_binary(path)
        try:
            self.states = {path: state_of(self._file.fileno())} if isinstance(path, Path) else {}
            self._size = self._file.seek(0, 2)
            head = bytearray(min(self._size, _MOST_HEADER))
            self._read_into(memoryview(head), 0)
            self.metadata, self._entries, self._data = _parse(bytes(head), self._size)
        except (_Malformed, struct.error, UnicodeDecodeError) as error:
            self._file.close()
            cut = "its header is cut off or too long" if isinstance(error, struct.error) else str(error)
            raise self._error(cut) from None
        except BaseException:
            self._file.close()
            raise
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> FloatArray:
        entry = self._entries[name]
        raw = np.empty(_bytes_of(entry), np.uint8)
        if not raw.size:
            raise AnalysisError(
                f"{self.path}: tensor {name} is of GGUF's type {entry.kind}; expected F32, F16, BF16 or Q8_0: convert "
                "the adapter again with --outtype f32"
            )
        self._read_into(raw.data, self._data + entry.begin)
        if entry.kind == _Q8:
            blocks = raw.view(_Q8_BLOCK)
            values: FloatArray = blocks["values"] * blocks["scale"].astype(np.float32)[:, None]
        else:
            values = raw.view(_KINDS[entry.kind])
        if entry.kind == 30:
            values = widened(values, "BF16")
        return values.reshape(entry.shape)

    def _read_into(self, target: memoryview, offset: int) -> None:
        try:
            self._file.seek(offset)
            while len(target):
                step = self._file.readinto(target)
                if not step:
                    raise self._error("it ends early")
                target = target[step:]
        except OSError as error:
            raise AnalysisError(f"{self.path}: cannot be read: {error.strerror}") from None

    def _error(self, what: str) -> AnalysisError:
        return AnalysisError(f"{self.path}: not a complete GGUF file: {what}; save or copy it again")


class _Reader:
    """Values one after another. What is cut off is a ``struct.error``."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        size = self.number("Q")
        if size > len(self.data) - self.at:
            raise struct.error
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> str:
        """A value as a text; of an array that it is one."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of, count = self.number("I"), self.number("Q")
            if of == _STRING:
                for _ in range(count):  # ends with the data, if not before
                    self.text()
            elif of in _SCALARS:
                self.at += count * struct.calcsize(f"<{_SCALARS[of]}")
            else:
                raise _Malformed(f"it has an array of unknown type {of}")
            return f"array of {count}"
        if kind not in _SCALARS:
            raise _Malformed(f"it has a value of unknown type {kind}")
        return repr(self.number(_SCALARS[kind]))


def _parse(head: bytes, size: int) -> tuple[dict[str, str], dict[str, _Entry], int]:
    """Keys and values, tensors, and where the data begins."""
    if head[:4] != b"GGUF":
        raise _Malformed("it does not begin as one")
    reader = _Reader(head)
    reader.at = 4
    version, tensors, keys = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in (2, 3):
        raise _Malformed(f"its version is {version}, or its numbers are big-endian; expected version 2 or 3")
    metadata: dict[str, str] = {}
    for _ in range(keys):
        key = reader.text()
        metadata[key] = reader.value(reader.number("I"))
        if key == "general.type" and metadata[key] != "adapter":
            return metadata, {}, 0
    entries: dict[str, _Entry] = {}
    for _ in range(tensors):
        name = reader.text()
        axes = reader.number("I")
        if axes > 4 or name in entries:
            raise _Malformed(f"tensor {name} has {axes} axes, or is there twice")
        if fault := check_name(name):
            raise _Malformed(fault)
        shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
        entries[name] = _Entry(shape, reader.number("I"), reader.number("Q"))
    text = metadata.get("general.alignment", "32")
    alignment = int(text) if text.isdigit() and text != "0" else 32
    data = -(-reader.at // alignment) * alignment
    for name, entry in entries.items():
        if data + entry.begin + _bytes_of(entry) > size or math.prod(entry.shape) > 2**48:
            raise _Malformed(f"tensor {name} reads beyond its data")
    return metadata, entries, data


def _bytes_of(entry: _Entry) -> int:
    """The bytes of a tensor; 0 for a type that ``read`` refuses."""
    values = math.prod(entry.shape)
    if entry.kind == _Q8 and entry.shape and entry.shape[-1] % _Q8_VALUES == 0:
        return values // _Q8_VALUES * _Q8_BLOCK.itemsize
    return values * np.dtype(_KINDS[entry.kind]).itemsize if entry.kind in _KINDS else 0
