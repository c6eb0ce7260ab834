"""Tensor files: named tensors, whose names and shapes are known at once and whose data is read on demand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import ChangedError
from msplora_analysis.files.addresses import Place

if TYPE_CHECKING:
    from typing import Self

MOST_AXES = 64  # of numpy
MOST_LETTERS = 1024  # of a name; the longest of real models have 200
Shape = tuple[int, ...]
FloatArray = NDArray[np.floating[Any]]
State = tuple[int, ...]
"""Of a local file: device, inode, size, times of modification and of change. It is another one once the content is."""


class TensorFile:
    """An open file of named tensors.

    Attributes:
        states: Every local file that was opened for it, as it was then.
        base: Tensors of the model before training, where it is open beside them; ``read`` knows them by these names.
    """

    path: Place
    shapes: dict[str, Shape]
    metadata: dict[str, str]
    states: dict[Path, State]
    base: Mapping[str, Shape] | None = None

    def read(self, name: str) -> FloatArray:
        """One tensor, not to be changed: float16/32/64 (bfloat16, float8 as float32), or int32/64 of one element."""
        raise NotImplementedError

    def read_indices(self, name: str) -> NDArray[np.int64]:
        """A tensor of whole numbers, which say where values stand."""
        raise NotImplementedError

    def read_part(self, name: str, begin: int, end: int) -> FloatArray:
        """Some of the values of a tensor, in the order of rows, as one axis: a large one need not be held whole."""
        return self.read(name).reshape(-1)[begin:end]

    def prefetch(self, names: Iterable[str]) -> None:
        """Say which tensors will be read next, so that those that lie side by side are read at once.

        They are good until the next call of this file's ``prefetch``. Nothing is done where the tensors are in memory
        already, or are too large to be held together.
        """

    def check_unchanged(self) -> None:
        """Raise ChangedError if a file is no longer the one that was opened, or no longer what it was then."""
        check_unchanged(self.states)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""


def check_name(name: str) -> str | None:
    """What is wrong with the name of a tensor, if anything: what no table can hold, or what only slows reading down."""
    if len(name) > MOST_LETTERS:
        return f"the name of tensor {name[:100]}... has {len(name)} characters; expected at most {MOST_LETTERS}"
    if not is_text(name):
        return f"the name of tensor {name} is not valid Unicode"
    return None


def state_of(file: Path | int) -> State:
    """The state of a local file, or of an open one by its descriptor."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_unchanged(states: dict[Path, State]) -> None:
    """Raise ChangedError if a file has another state than here."""
    for path, state in states.items():
        try:
            if state_of(path) == state:
                continue
        except OSError:  # it is gone
            pass
        raise ChangedError(f"{path}: it changed while it was read; try again when nothing writes to it")


def is_text(name: str) -> bool:
    """Whether there are no lone surrogates, which JSON and pickle can express and no table can hold."""
    return name.isascii() or name.encode(errors="ignore").decode() == name
