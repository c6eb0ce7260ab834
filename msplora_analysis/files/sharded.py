"""Checkpoints of whole models: one file, or shards and an index, as transformers and diffusers save them.

An index (``model.safetensors.index.json``, ``pytorch_model.bin.index.json``) is a JSON object whose ``weight_map`` says
which shard, a file beside it, holds each tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, read_bytes
from msplora_analysis.files.opening import open_tensors
from msplora_analysis.files.tensors import FloatArray, Shape, TensorFile

INDEX_SUFFIX = ".index.json"
_SINGLE = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
FULL_NAMES = tuple(name + suffix for name in _SINGLE for suffix in ("", INDEX_SUFFIX))  # in order of preference

_LARGEST_INDEX = 32 * 2**20  # bytes


def find_checkpoint(path: Place) -> Place:
    """The file of a model, or the index of its shards: ``path`` itself, or in the folder ``path``."""
    if path.is_file():
        return path
    for name in FULL_NAMES:
        if (path / name).is_file():
            return path / name
    if not path.is_dir():
        raise AnalysisError(f"{path}: no such file or folder; expected a model's weights, or their folder")
    raise AnalysisError(f"{path}: no model in this folder; expected one of {', '.join(FULL_NAMES)}")


def open_checkpoint(path: Place) -> TensorFile:
    """Open a model's weights: a file, an index of shards, or the folder of either."""
    file = find_checkpoint(path)
    return ShardedFile(file) if file.name.endswith(INDEX_SUFFIX) else open_tensors(file)


class ShardedFile:
    """The shards of an index as one file. One shard is open at a time: read in the order of ``shapes``."""

    def __init__(self, path: Place) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        self._shards = _weight_map(path)
        self._opened: TensorFile | None = None
        self._name = ""
        try:
            for shard in dict.fromkeys(self._shards.values()):
                self._add_shapes(shard)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> ShardedFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._opened is not None:
            self._opened.__exit__(None, None, None)
        self._opened, self._name = None, ""

    def read(self, name: str) -> FloatArray:
        return self._open(self._shards[name]).read(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Nothing: the tensors of a whole model are too large to be held together."""

    def _open(self, shard: str) -> TensorFile:
        if self._opened is None or self._name != shard:
            self.__exit__()
            file = self.path.parent / shard
            if not file.is_file():
                raise AnalysisError(f"{self.path}: its shard {shard} is missing; copy it there")
            self._opened, self._name = open_tensors(file), shard
        return self._opened

    def _add_shapes(self, shard: str) -> None:
        shapes = self._open(shard).shapes
        for name in (name for name, at in self._shards.items() if at == shard):
            if name not in shapes:
                raise AnalysisError(f"{self.path}: tensor {name} is not in its shard {shard}; save or copy it again")
            self.shapes[name] = shapes[name]


def _weight_map(path: Place) -> dict[str, str]:
    try:
        value = json.loads(read_bytes(path, _LARGEST_INDEX))
        shards = value["weight_map"]
    except AnalysisError:
        raise
    except (ValueError, RecursionError, TypeError, KeyError):
        raise AnalysisError(f"{path}: expected a JSON object with a weight_map; save or copy it again") from None
    # A shard is a file beside the index: no path may lead elsewhere.
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and shard and Path(shard).name == shard for shard in shards.values()
    ):
        raise AnalysisError(f"{path}: its weight_map is not of tensor names and file names; save or copy it again")
    return shards
