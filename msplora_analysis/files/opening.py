"""Open tensors: one file by its suffix, the shards of a whole model by their index, a model beside its base.

An index (``model.safetensors.index.json``, ``pytorch_model.bin.index.json``), as transformers and diffusers write it,
is a JSON object whose ``weight_map`` says which shard, a file beside it, holds each tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, open_binary, read_json
from msplora_analysis.files.gguf import GgufFile
from msplora_analysis.files.safetensors import SafetensorsFile
from msplora_analysis.files.several import METADATA, RANKS, DistributedFile, RankedFile
from msplora_analysis.files.tensors import FloatArray, TensorFile, check_unchanged, state_of
from msplora_analysis.files.torch_file import TorchFile

INDEX_SUFFIX = ".index.json"
_SINGLE = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
FULL_NAMES = tuple(name + suffix for name in _SINGLE for suffix in ("", INDEX_SUFFIX))  # in order of preference
_INDEX = {"weight_map": {...: str}}
BASE = "base:"  # tensors of the base are named with it


def open_tensors(path: Place) -> TensorFile:
    """Open a file of tensors by its suffix; with it those that hold further parts of the same tensors.

    Raises:
        AnalysisError: It is no such file; the message says what it is instead, where its first bytes tell.
    """
    if path.name == METADATA:
        return DistributedFile(path)
    try:
        if RANKS.fullmatch(path.name):
            return RankedFile(path)
        file = {".safetensors": SafetensorsFile, ".gguf": GgufFile}.get(path.suffix, TorchFile)(path)
    except AnalysisError:
        if other := _what_it_is(path):
            raise AnalysisError(f"{path}: {other}") from None
        raise
    if isinstance(file, TorchFile) and (
        cut := next((name for name, part in file.parts.items() if part.axis is not None), None)
    ):
        file.__exit__()
        raise AnalysisError(
            f"{path}: tensor {cut} is cut among several processes, and this file has one part; give the folder with "
            "the files of all, under the names that they were saved with"
        )
    return file


def _what_it_is(path: Place) -> str | None:
    """What a file is that stands in place of tensors, and what to do."""
    with open_binary(path) as file:
        begin = file.read(64).lstrip()
    if begin.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run git lfs pull in its repository, or download the file"
    if begin[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, not the file itself; download the file again (log in, if that takes a login)"
    if path.suffix == ".safetensors" and begin.startswith((b"PK\3\4", b"\x80\x02")):
        return "it was saved by torch.save, not as safetensors; rename it to end in .bin"
    return None


def is_of_several(path: Place) -> bool:
    """Whether the file of this name is read together with others of its folder."""
    return path.name == METADATA or path.name.endswith(INDEX_SUFFIX) or RANKS.fullmatch(path.name) is not None


def open_checkpoint(path: Place) -> TensorFile:
    """Open a model's weights: a file, an index of shards, or the folder of either."""
    file = path if path.is_file() else next((path / name for name in FULL_NAMES if (path / name).is_file()), None)
    if file is None and path.is_dir():
        raise AnalysisError(f"{path}: no model in this folder; expected one of {', '.join(FULL_NAMES)}")
    if file is None:
        raise AnalysisError(f"{path}: no such file or folder; expected a model's weights, or their folder")
    return ShardedFile(file) if file.name.endswith(INDEX_SUFFIX) else open_tensors(file)


class ShardedFile(TensorFile):
    """The shards of an index as one file. One shard is open at a time: read in the order of ``shapes``."""

    def __init__(self, path: Place) -> None:
        self.path, self.metadata, self.shapes = path, {}, {}
        self.states = {path: state_of(path)} if isinstance(path, Path) else {}
        self._opened: TensorFile | None = None
        self._shards: dict[str, str] = read_json(path, _INDEX)["weight_map"]
        # A shard is a file beside the index: no path may lead elsewhere.
        if outside := next((shard for shard in self._shards.values() if not shard or Path(shard).name != shard), None):
            raise AnalysisError(f"{path}: weight_map names {outside}, no file beside it; save or copy it again")
        try:
            for shard in dict.fromkeys(self._shards.values()):
                shapes = self._open(shard).shapes
                for name in (name for name, at in self._shards.items() if at == shard):
                    if name not in shapes:
                        raise AnalysisError(f"{path}: tensor {name} is not in its shard {shard}; save or copy it again")
                    self.shapes[name] = shapes[name]
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self._opened is not None:
            self._opened.__exit__()
        self._opened = None

    def read(self, name: str) -> FloatArray:
        return self._open(self._shards[name]).read(name)

    def read_indices(self, name: str) -> NDArray[np.int64]:
        return self._open(self._shards[name]).read_indices(name)

    def read_part(self, name: str, begin: int, end: int) -> FloatArray:
        return self._open(self._shards[name]).read_part(name, begin, end)

    def _open(self, shard: str) -> TensorFile:
        if self._opened is None or self._opened.path.name != shard:
            self.__exit__()
            file = self.path.parent / shard
            if not file.is_file():
                raise AnalysisError(f"{self.path}: its shard {shard} is missing; copy it there")
            self._opened = open_tensors(file)
            check_unchanged({path: state for path, state in self.states.items() if path in self._opened.states})
            self.states |= self._opened.states
        return self._opened


class RenamedFile(TensorFile):
    """A file whose tensors have other names here.

    Args:
        file: The open file; it is closed with this one.
        names: The name in the file of each tensor, by its name here.
    """

    def __init__(self, file: TensorFile, names: dict[str, str]) -> None:
        self._file, self._names = file, names
        self.path, self.metadata, self.states = file.path, file.metadata, file.states
        self.shapes = {name: file.shapes[own] for name, own in names.items()}

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    def prefetch(self, names: Iterable[str]) -> None:
        self._file.prefetch(self._names[name] for name in names)

    def read(self, name: str) -> FloatArray:
        return self._file.read(self._names[name])

    def read_indices(self, name: str) -> NDArray[np.int64]:
        return self._file.read_indices(self._names[name])

    def read_part(self, name: str, begin: int, end: int) -> FloatArray:
        return self._file.read_part(self._names[name], begin, end)


class PairedFile(TensorFile):
    """A model's checkpoint, and the model it was trained from with ``base:`` before the names of its tensors.

    Errors of reading name the file that they are about; ``path`` is the checkpoint's.

    Args:
        tuned: The open checkpoint; it is closed with this file, and where the base cannot be opened.
        base: A file, an index of shards, or the folder of either.
    """

    def __init__(self, tuned: TensorFile, base: Place) -> None:
        try:
            self._tuned, self._base = tuned, open_checkpoint(base)
        except BaseException:
            tuned.__exit__()
            raise
        self.path, self.metadata = tuned.path, tuned.metadata
        self.states = tuned.states | self._base.states
        self.shapes = tuned.shapes | {BASE + name: shape for name, shape in self._base.shapes.items()}

    def __exit__(self, *_: object) -> None:
        self._tuned.__exit__()
        self._base.__exit__()

    def read(self, name: str) -> FloatArray:
        return self._of(name).read(name.removeprefix(BASE))

    def read_indices(self, name: str) -> NDArray[np.int64]:
        return self._of(name).read_indices(name.removeprefix(BASE))

    def read_part(self, name: str, begin: int, end: int) -> FloatArray:
        return self._of(name).read_part(name.removeprefix(BASE), begin, end)

    def _of(self, name: str) -> TensorFile:
        return self._base if name.startswith(BASE) else self._tuned


class AdapterWithBase(PairedFile):
    """An adapter, and the model it was trained from: ``shapes`` are of the adapter alone, ``base`` of the model."""

    def __init__(self, adapter: TensorFile, base: Place) -> None:
        super().__init__(adapter, base)
        self.base = {name: shape for name, shape in self.shapes.items() if name.startswith(BASE)}
        self.shapes = adapter.shapes

    def prefetch(self, names: Iterable[str]) -> None:
        self._tuned.prefetch(name for name in names if not name.startswith(BASE))
