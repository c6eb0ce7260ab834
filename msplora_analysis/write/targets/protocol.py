"""What a target says of itself: a format that adapters are written in, for those who read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from msplora_analysis.write.base_model import BaseModel
from msplora_analysis.write.source import Source
from msplora_analysis.write.write import DTYPES, Pair


@dataclass(frozen=True, kw_only=True)
class Target:
    """A format to write. A module of this folder has one as ``TARGET``, and is its value of ``--to``.

    Attributes:
        what: What the file is called in sentences.
        files: Names of the files that it writes; an adapter in the way of a new one is known by them.
        write: Writes them to a folder, of pairs in the type named; yields notes, of what a user must know. It raises
            AnalysisError, without the file's name, for what the format cannot hold.
        dtypes: Types of factors that its readers take.
        rest: Whether it holds what is trained beside the factors: heads, biases, embeddings.
        pipeline: Whether it holds the updates of several models.
    """

    what: str
    files: tuple[str, ...]
    write: Callable[[Path, Sequence[Pair], str, Source, BaseModel | None], Iterator[str]]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    rest: bool = False
    pipeline: bool = False
