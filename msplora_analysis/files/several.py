"""Whole checkpoints in several files: parts of processes put together, tensor by tensor, when they are read.

- PyTorch's distributed checkpoints (DCP): ``.metadata`` says which bytes of which ``.distcp`` beside it hold which part
  of each tensor, saved there by ``torch.save``. Source: torch/distributed/checkpoint/metadata.py, filesystem.py.
- verl: ``model_world_size_<n>_rank_<i>.pt`` of each process, whose tensors are parts (DTensor) along one axis, in the
  order of the ranks. Source: verl/utils/checkpoint/fsdp_checkpoint_manager.py.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, open_binary
from msplora_analysis.files.tensors import (
    MOST_AXES,
    FloatArray,
    Shape,
    TensorFile,
    check_name,
    check_unchanged,
    state_of,
)
from msplora_analysis.files.torch_file import NESTED, TorchFile
from msplora_analysis.files.torch_pickle import Record, RefusedError, are_counts, unpickle

METADATA = ".metadata"
RANKS = re.compile(r"model_world_size_([0-9]{1,5})_rank_([0-9]{1,5})\.pt")
_MOST_METADATA = 64 * 2**20  # bytes: some 100,000 parts


class _Chunk(NamedTuple):
    """A part of a tensor: where it begins, its shape, and where it is saved."""

    offset: Shape
    shape: Shape
    file: str
    begin: int
    size: int


class _SeveralFiles(TensorFile):
    """Tensors whose parts are in several files beside ``path``."""

    def __init__(self, path: Place) -> None:
        self.path, self.metadata, self.shapes = path, {}, {}
        self.states = {path: state_of(path)} if isinstance(path, Path) else {}

    def read(self, name: str) -> FloatArray:
        found: FloatArray | None = None
        for offset, values in self._parts(name):
            if values.shape == self.shapes[name]:
                return values
            if found is None:
                found = np.full(self.shapes[name], np.nan, values.dtype)
            found[tuple(slice(at, at + size) for at, size in zip(offset, values.shape, strict=True))] = values
        return np.empty(self.shapes[name], np.float32) if found is None else found

    def _parts(self, name: str) -> Iterator[tuple[Shape, FloatArray]]:
        """The parts of a tensor, and where each begins; together they are all of it."""
        raise NotImplementedError

    def _beside(self, name: str) -> Place:
        file = self.path.parent / name
        if not file.is_file():
            raise AnalysisError(f"{self.path}: {name}, which holds a part of its tensors, is missing; copy it there")
        return file

    def _opened(self, name: str, part: tuple[int, int] | None = None) -> TorchFile:
        opened = TorchFile(self._beside(name), part)
        check_unchanged({path: state for path, state in self.states.items() if path in opened.states})
        self.states |= opened.states
        return opened


class DistributedFile(_SeveralFiles):
    """A distributed checkpoint of PyTorch, by its ``.metadata``. Of what it holds, the tensors of the model."""

    def __init__(self, path: Place) -> None:
        super().__init__(path)
        try:
            fields = _fields(_loaded(path), "Metadata")
            tensors = fields.get("state_dict_metadata")
            places = fields.get("storage_data")
            if type(tensors) is not dict or type(places) is not dict:
                raise RefusedError("it lists no tensors")
            chunks = {
                name: (about, _chunks(name, about, places))
                for name, about in tensors.items()
                if type(about) is Record and about.type == "TensorStorageMetadata"
            }
            self._chunks: dict[str, list[_Chunk]] = {}
            for name, key in _of_model(chunks, fields.get("planner_data")).items():
                if fault := check_name(name):
                    raise RefusedError(fault)
                about, self._chunks[name] = chunks[key]
                self.shapes[name] = about.fields["size"]
            self._check_sizes()
        except RefusedError as error:
            raise AnalysisError(
                f"{path}: not the list of a distributed checkpoint of PyTorch: {error}; save or copy it again"
            ) from None

    def _check_sizes(self) -> None:
        """Raise if a part lies outside its file, or the parts have more bytes than the files."""
        found = [chunk for chunks in self._chunks.values() for chunk in chunks]
        sizes = {}
        for name in {chunk.file for chunk in found}:
            with open_binary(self._beside(name)) as file:
                sizes[name] = file.seek(0, io.SEEK_END)
        if any(chunk.begin + chunk.size > sizes[chunk.file] for chunk in found):
            raise RefusedError("a part of a tensor lies beyond the end of its file")
        if sum(chunk.size for chunk in found) > sum(sizes.values()):
            raise RefusedError("parts of tensors share bytes")

    def _parts(self, name: str) -> Iterator[tuple[Shape, FloatArray]]:
        for chunk in self._chunks[name]:
            with self._opened(chunk.file, (chunk.begin, chunk.size)) as file:
                if file.shapes.get("") != chunk.shape:
                    raise AnalysisError(
                        f"{file.path}: what stands at byte {chunk.begin} is not the part of {name} that {METADATA} "
                        "says; save or copy the checkpoint again"
                    )
                yield chunk.offset, file.read("")


class RankedFile(_SeveralFiles):
    """The files of all processes of verl, by that of the first."""

    def __init__(self, path: Place) -> None:
        super().__init__(path)
        match = RANKS.fullmatch(path.name)
        count = int(match[1]) if match else 1
        self._files: list[TorchFile] = []
        try:
            for rank in range(count):
                self._files.append(self._opened(f"model_world_size_{count}_rank_{rank}.pt"))
                if rank == 0 and not self._files[0].parts:
                    break  # every process has all
            for name, shape in self._files[0].shapes.items():
                self.shapes[name] = self._whole(name, shape)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.__exit__()

    def _whole(self, name: str, shape: Shape) -> Shape:
        """The shape of a tensor, if its parts make it up."""
        part = self._files[0].parts.get(name)
        if part is None or part.axis is None:
            return shape
        *_, (last, size) = self._cuts(name)
        if last + size != part.shape[part.axis]:
            raise AnalysisError(
                f"{self.path}: the parts of tensor {name} have {last + size} of {part.shape[part.axis]} along axis "
                f"{part.axis}; save or copy the checkpoint again"
            )
        return part.shape

    def _cuts(self, name: str) -> Iterator[tuple[int, int]]:
        """Where each part begins along the axis of the cut, and how long it is, until the tensor is whole.

        Further files have copies, where groups of processes hold the same.
        """
        part = self._files[0].parts[name]
        axis, begin = part.axis or 0, 0
        for file in self._files:
            shape = file.shapes.get(name, ())
            if file.parts.get(name) != part or (*shape[:axis], *shape[axis + 1 :]) != (
                *part.shape[:axis],
                *part.shape[axis + 1 :],
            ):
                raise AnalysisError(f"{file.path}: tensor {name} is not as in {self.path.name}; save or copy it again")
            yield begin, shape[axis]
            begin += shape[axis]
            if begin >= part.shape[axis]:
                return

    def _parts(self, name: str) -> Iterator[tuple[Shape, FloatArray]]:
        part = self._files[0].parts.get(name)
        if part is None or part.axis is None:
            yield (0,) * len(self.shapes[name]), self._files[0].read(name)
            return
        for file, (begin, _) in zip(self._files, self._cuts(name), strict=False):
            yield tuple(begin if i == part.axis else 0 for i in range(len(part.shape))), file.read(name)


def _loaded(path: Place) -> Any:
    with open_binary(path) as file:
        size = file.seek(0, io.SEEK_END)
        if size > _MOST_METADATA:
            raise RefusedError(f"it has {size} bytes; expected at most {_MOST_METADATA}")
        file.seek(0)
        return unpickle(io.BytesIO(file.readall() or b""))


def _fields(value: Any, kind: str) -> dict[str, Any]:
    if type(value) is not Record or value.type != kind:
        raise RefusedError(f"it holds no {kind}")
    return value.fields


def _chunks(name: str, about: Record, places: dict[Any, Any]) -> list[_Chunk]:
    """The parts of a tensor, which must be as many values as it has."""
    size, parts = about.fields.get("size"), about.fields.get("chunks")
    if type(size) is not tuple or not are_counts(*size) or len(size) > MOST_AXES or type(parts) is not list:
        raise RefusedError(f"tensor {name[:100]} has no size or no parts")
    found = []
    for one in parts:
        fields = _fields(one, "ChunkStorageMetadata")
        offset: Any = fields.get("offsets")
        shape: Any = fields.get("sizes")
        if not all(type(axes) is tuple and len(axes) == len(size) and are_counts(*axes) for axes in (offset, shape)):
            raise RefusedError(f"a part of tensor {name[:100]} is malformed")
        if any(at + length > whole for at, length, whole in zip(offset, shape, size, strict=True)):
            raise RefusedError(f"a part of tensor {name[:100]} lies outside it")
        place = _fields(places.get((name, offset)), "_StorageInfo")
        found_at: Any = [place.get(key) for key in ("relative_path", "offset", "length")]
        file, begin, length = found_at
        if type(file) is not str or Path(file).name != file or not are_counts(begin, length):
            raise RefusedError(f"the place of a part of tensor {name[:100]} is malformed")
        if place.get("transform_descriptors"):
            raise RefusedError(f"tensor {name[:100]} is stored compressed; save it without transforms")
        if math.prod(shape) > length:
            raise RefusedError(f"a part of tensor {name[:100]} has more values than bytes")
        found.append(_Chunk(offset, shape, file, begin, length))
    if sum(math.prod(chunk.shape) for chunk in found) != math.prod(size):
        raise RefusedError(f"the parts of tensor {name[:100]} are not all of it")
    return found


def _of_model(names: dict[str, Any], paths: Any) -> dict[str, str]:
    """The model's tensors by their own names. ``paths``: what led to each in the dictionary that was saved."""
    known = {name: paths.get(name) if type(paths) is dict else None for name in names}
    inside = {
        name: path
        for name, path in known.items()
        if type(path) is tuple and len(path) > 1 and path[0] in NESTED and all(type(step) is str for step in path)
    }
    return {".".join(path[1:]): name for name, path in inside.items()} or {name: name for name in names}
