"""A model's checkpoint beside the model it was trained from, as one file."""

from __future__ import annotations

from collections.abc import Iterable

from msplora_analysis.files.addresses import Place
from msplora_analysis.files.sharded import open_checkpoint
from msplora_analysis.files.tensors import FloatArray, Shape, TensorFile

BASE = "base:"  # the base's tensors are named with it


class PairedFile:
    """Two open files: the first one's tensors under their names, the second's as ``base:<name>``.

    Errors of reading name the file that they are about; ``path`` is the first's.

    Args:
        tuned: The open checkpoint; it is closed with this file, and where the base cannot be opened.
        base: A file, an index of shards, or the folder of either.
    """

    def __init__(self, tuned: TensorFile, base: Place) -> None:
        try:
            self._tuned, self._base = tuned, open_checkpoint(base)
        except BaseException:
            tuned.__exit__(None, None, None)
            raise
        self.path = tuned.path
        self.metadata = tuned.metadata
        self.shapes: dict[str, Shape] = {
            **tuned.shapes,
            **{BASE + name: shape for name, shape in self._base.shapes.items()},
        }

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
