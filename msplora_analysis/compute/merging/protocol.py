"""What a way to merge is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from msplora_analysis.compute.linalg.core_space import Array, CoreSpace, core_space


class Part(NamedTuple):
    """An adapter's update of the module, ``b @ a``.

    a: (r, cols), and b: (rows, r), float64, the scaling in b. weight: of the adapter. scaling: (r,), the scaling in b.
    """

    a: Array
    b: Array
    weight: float
    scaling: Array


class Settings(NamedTuple):
    """rank, energy: of the result. density: the share of entries that is kept. seed: of what is drawn.

    kl: what each part's task may lose; the parts are cut by it before they are merged.
    """

    rank: int | None = None
    energy: float | None = None
    density: float = 0.5
    seed: int = 0
    kl: float | None = None


class Method(NamedTuple):
    """A way to merge.

    Attributes:
        merge: From the parts of a module and the settings, A (k, cols) and B (rows, k).
        cuts: Whether the result is cut to rank or energy already.
        what: One line about it.
        source: Where it is from.
    """

    merge: Callable[[Sequence[Part], Settings], tuple[Array, Array]]
    what: str
    source: str
    cuts: bool = False


def space_of(parts: Sequence[Part]) -> CoreSpace:
    """The space that all updates span."""
    return core_space([(part.a, part.b) for part in parts])
