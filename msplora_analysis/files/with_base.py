"""A model's checkpoint beside the model it was trained from, as one file."""

from __future__ import annotations

from collections.abc import Iterable

from msplora_analysis.files.addresses import Place
from msplora_analysis.files.sharded import open_checkpoint
from msplora_analysis.files.tensors import FloatArray, Shape, TensorFile

BASE = "base:"  # the base's tensors are named with it


def open_with_base(path: Place, base: Place) -> PairedFile:
    """Open a checkpoint and its base, each a file, an index of shards, or the folder of either."""
    tuned = open_checkpoint(path)
    try:
        return PairedFile(tuned, open_checkpoint(base))
    except BaseException:
        tuned.__exit__(None, None, None)
        raise


class PairedFile:
    """Two open files: the first one's tensors under their names, the second's as ``base:<name>``.

    Errors of reading name the file that they are about; ``path`` is the first's.
    """

    def __init__(self, tuned: TensorFile, base: TensorFile) -> None:
        self.path = tuned.path
        self.metadata = tuned.metadata
        self.shapes: dict[str, Shape] = {
            **tuned.shapes,
            **{BASE + name: shape for name, shape in base.shapes.items()},
        }
        self._tuned, self._base = tuned, base

    def __enter__(self) -> PairedFile:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._tuned, self._base):
            file.__exit__(None, None, None)

    def read(self, name: str) -> FloatArray:
        if name.startswith(BASE):
            return self._base.read(name.removeprefix(BASE))
        return self._tuned.read(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Nothing: the tensors of a whole model are too large to be held together."""
