"""Read ``.bin`` and ``.pt`` files of PyTorch with numpy alone: what ``torch.save`` writes of a dictionary of tensors.

A file is a zip archive (PyTorch >= 1.6) of a pickle, ``<name>/data.pkl``, and of the bytes of every storage,
``<name>/data/<key>``, none of them compressed; or, before, five pickles and then the storages, each behind the
number of its values. ``torch_pickle`` reads pickles without running them.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, open_binary
from msplora_analysis.files.narrow import NARROW, widened
from msplora_analysis.files.tensors import FloatArray, TensorFile, check_name, state_of
from msplora_analysis.files.torch_pickle import RefusedError, Storage, Stored, kind_of, unpickle

_READABLE = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "float8_e4m3fn": "u1",
    "float8_e5m2": "u1",
}
_READABLE_ALONE = {"int64": "<i8", "int32": "<i4"}  # one number: alpha, say
_MOST_PICKLED = 8 * 2**20  # bytes of the pickle that names the tensors: some 40,000 of them
_MOST_LISTED = 8 * 2**20  # bytes of the list of a zip archive's entries
_MOST_SHARED = 256  # how often the bytes of a file may be read for different tensors: tied weights of every layer
_ZIP = b"PK\3\4"
_MAGIC = 0x1950A86A20F9469CFC6C
NESTED = ("state_dict", "model_state_dict", "model", "module", "adapter", "lora")
"""What a dictionary of more than tensors calls that of the tensors."""


class _Place(NamedTuple):
    """Where a storage lies in the file."""

    begin: int
    size: int


class TorchFile(TensorFile):
    """A ``.bin`` or ``.pt`` file: a dictionary of tensors, or one of a few names in a dictionary of more.

    A tensor is read when it is asked for, so memory stays flat.

    Args:
        path: The file.
        part: Where in the file to read, from which byte and how many: what was saved there may be one tensor, then
            of the name "". None: all of it.

    Attributes:
        parts: The tensors that are cut among several files, of which this is one: ``shapes`` has what is here.
    """

    def __init__(self, path: Place, part: tuple[int, int] | None = None) -> None:
        self.path, self.metadata = path, {}
        raw = open_binary(path)
        self._file = _Bounded(Window(raw, *part) if part else raw)
        try:
            self.states = {path: state_of(raw.fileno())} if isinstance(path, Path) else {}
            self._size = self._file.seek(0, io.SEEK_END)
            self._file.seek(0)
            zipped = self._file.read(len(_ZIP)) == _ZIP
            self._file.seek(0)
            loaded, self._places = (_read_zip if zipped else _read_legacy)(self._file)
            self._tensors = self._named(loaded)
            self._check()
        except (RefusedError, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
            self._file.close()
            raise self._error(str(error) or type(error).__name__) from None
        except OSError as error:
            self._file.close()
            raise AnalysisError(f"{path}: cannot be read: {error.strerror or error}") from None
        except BaseException:
            self._file.close()
            raise
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.parts = {name: tensor.part for name, tensor in self._tensors.items() if tensor.part}

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> FloatArray:
        alone = _READABLE_ALONE if self._tensors[name].values == 1 else {}
        return self._read(name, _READABLE, alone)

    def read_indices(self, name: str) -> NDArray[np.int64]:
        return self._read(name, _READABLE_ALONE, {}).astype(np.int64)

    def _read(self, name: str, readable: Mapping[str, str], also: Mapping[str, str]) -> NDArray[Any]:
        tensor = self._tensors[name]
        kind = readable.get(tensor.kind) or also.get(tensor.kind)
        if tensor.storage is None:
            raise AnalysisError(f"{self.path}: tensor {name} is {tensor.kind}; expected a dense tensor")
        if kind is None:
            raise AnalysisError(
                f"{self.path}: tensor {name} is of type {tensor.kind}; expected one of {', '.join(readable)}"
            )
        begin = self._places[tensor.storage.key].begin + tensor.storage.begin + tensor.offset * tensor.item
        raw = np.empty(tensor.span * tensor.item, np.uint8)
        self._read_into(raw.data, begin)
        values = raw.view(kind)
        if tensor.kind in NARROW:
            values = widened(values, tensor.kind)
        strides = [stride * values.itemsize for stride in tensor.strides]
        array: NDArray[Any] = np.lib.stride_tricks.as_strided(values, tensor.shape, strides)
        return -array if tensor.negated else array

    def _read_into(self, target: memoryview, offset: int) -> None:
        try:
            self._file.seek(offset)
            if self._file.readinto(target) != len(target):
                raise self._error("it ends early")
        except OSError as error:
            raise AnalysisError(f"{self.path}: cannot be read: {error.strerror}") from None

    def _named(self, loaded: Any) -> dict[str, Stored]:
        """The dictionary of tensors that the file is, or that it holds under a name that is usual."""
        if type(loaded) is Stored and isinstance(self._file.raw, Window):
            return {"": loaded}
        if pairs := _pairs(loaded):
            return pairs
        if not isinstance(loaded, dict):
            raise AnalysisError(f"{self.path}: expected a dictionary of named tensors, got {kind_of(loaded)}")
        inner = [loaded[name] for name in NESTED if type(loaded.get(name)) is dict and loaded[name]]
        for tensors in (loaded, *inner):
            if all(type(name) is str and type(tensor) is Stored for name, tensor in tensors.items()):
                return tensors
        name, other = next((n, t) for n, t in loaded.items() if type(n) is not str or type(t) is not Stored)
        raise AnalysisError(
            f"{self.path}: expected a dictionary of named tensors; {name!r} is of type {kind_of(other)}"
        )

    def _check(self) -> None:
        """Raise for a tensor with more values than it has bytes, or with bytes that are not in the file."""
        total = 0
        for name, tensor in self._tensors.items():
            if fault := check_name(name):
                raise self._error(fault)
            if tensor.storage is None or not tensor.item:  # a type that ``read`` refuses
                continue
            if tensor.values * tensor.item > tensor.storage.size:
                raise AnalysisError(
                    f"{self.path}: tensor {name} of shape {list(tensor.shape)} is an expanded view of fewer values; "
                    "save it contiguous"
                )
            place = self._places.get(tensor.storage.key)
            if place is None:
                raise RefusedError(f"the data of tensor {name} is missing")
            end = (tensor.offset + tensor.span) * tensor.item if tensor.span else 0
            stored = tensor.storage.begin + tensor.storage.size
            if end > tensor.storage.size or stored > place.size or place.begin + place.size > self._size:
                raise RefusedError(f"tensor {name} reads beyond its data")
            total += tensor.span * tensor.item
        if total > _MOST_SHARED * self._size:
            raise AnalysisError(f"{self.path}: its tensors share few bytes; expected each with data of its own")

    def _error(self, what: str) -> AnalysisError:
        return AnalysisError(f"{self.path}: not a file of PyTorch's tensors: {what}; save or copy it again")


def _pairs(loaded: Any) -> dict[str, Stored]:
    """The tensors of cloneofsimo's lora, a list of up and down by turns, by the names that its safetensors have."""
    if (
        type(loaded) is not list
        or len(loaded) % 2
        or any(type(one) is not Stored or len(one.shape) < 2 for one in loaded)
    ):
        return {}
    if any(up.shape[1] != down.shape[0] for up, down in zip(loaded[::2], loaded[1::2], strict=True)):
        return {}
    return {f"lora:{i // 2}:{('up', 'down')[i % 2]}": tensor for i, tensor in enumerate(loaded)}


class Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, file: io.RawIOBase, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any, /) -> int:
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(memoryview(target)[: max(self._size - self._at, 0)]) or 0
        self._at += count
        return count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


class _Bounded(io.BufferedReader):
    """A file of which no more is read at once than the pickle or the list of a zip archive may have."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            at = self.tell()
            size = self.seek(0, io.SEEK_END) - at
            self.seek(at)
        if size > max(_MOST_LISTED, _MOST_PICKLED):
            raise RefusedError(f"its names and shapes take {size} bytes; expected at most {_MOST_PICKLED}")
        return super().read(size)


def _read_zip(file: IO[bytes]) -> tuple[Any, dict[str, _Place]]:
    """What was saved, and where its storages are."""
    try:
        archive = zipfile.ZipFile(file)  # only reads the list of entries
    except (ValueError, OverflowError) as error:  # struct's and zipfile's own
        if isinstance(error, RefusedError):
            raise
        raise RefusedError("its list of entries is damaged") from None
    entries = {entry.filename: entry for entry in archive.infolist()}
    # One and the same to every reader: PyTorch finds names whatever their case.
    if len({name.lower() for name in entries}) < len(archive.infolist()):
        raise RefusedError("an entry occurs twice")
    pickles = [name for name in entries if name.lower().endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1 or not pickles[0].endswith("data.pkl"):
        raise RefusedError("it has no data.pkl, or several")
    top = pickles[0].removesuffix("data.pkl")
    for entry in entries.values():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise RefusedError(f"its entry {entry.filename[:100]} is compressed, which PyTorch never does")
    order = entries.get(f"{top}byteorder")
    if order is not None and _content(file, order) != b"little":
        raise RefusedError("its numbers are big-endian")
    storages: dict[str, Storage] = {}
    loaded = unpickle(io.BytesIO(_content(file, entries[pickles[0]])), storages)
    data = {key: entries[f"{top}data/{key}"] for key in storages if f"{top}data/{key}" in entries}
    return loaded, {key: _place(file, entry) for key, entry in data.items()}


def _content(file: IO[bytes], entry: zipfile.ZipInfo) -> bytes:
    begin, size = _place(file, entry)
    file.seek(begin)
    content = file.read(size)
    if zlib.crc32(content) != entry.CRC:
        raise RefusedError(f"its entry {entry.filename[:100]} is damaged")
    return content


def _place(file: IO[bytes], entry: zipfile.ZipInfo) -> _Place:
    """Where the data of an entry is: behind its own header, of 30 bytes and two texts."""
    if not 0 <= entry.header_offset < 2**63:  # no file is as long
        raise RefusedError("its list of entries is damaged")
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != _ZIP:
        raise RefusedError("its list of entries is damaged")
    texts = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return _Place(entry.header_offset + 30 + texts, entry.file_size)


def _read_legacy(file: IO[bytes]) -> tuple[Any, dict[str, _Place]]:
    """A file without zip: a magic number, a version, facts of the machine, what was saved, keys, and the storages."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = io.BytesIO(file.read(min(_MOST_PICKLED, size)))
    storages: dict[str, Storage] = {}
    if (unpickle(head), unpickle(head)) != (_MAGIC, 1001):
        raise RefusedError("it does not begin as one")
    about, loaded, keys = unpickle(head), unpickle(head, storages), unpickle(head)
    if type(about) is not dict or not about.get("little_endian"):
        raise RefusedError("its numbers are big-endian")
    places: dict[str, _Place] = {}
    at = head.tell()
    for key in keys if type(keys) is list else ():
        if type(key) is not str or key not in storages or at > size:
            raise RefusedError("its list of storages is malformed")
        file.seek(at)
        values = int.from_bytes(file.read(8), "little")
        places[key] = _Place(at + 8, values * storages[key].item)
        at = sum(places[key])
    return loaded, places
