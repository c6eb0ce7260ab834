"""The algebra of updates: sums and Kronecker products of low-rank factors, made from the tensors of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import printable
from msplora_analysis.files.addresses import natural_key
from msplora_core import names

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

SCALES = (*names.SCALES, names.TOTAL)


@dataclass(frozen=True)
class Factor:
    """A matrix of shape (rows, cols), made from tensors of the file.

    Attributes:
        tensors: Names in the file.
        rows: Length of the first axis.
        cols: Product of the others.
        make: A function of these tensors, each an array of its own shape and type, that gives a new float64 array.
            None: the factor is the one tensor, its further axes flattened.
        indices: Names of tensors of whole numbers; ``make`` takes them after the others.
    """

    tensors: tuple[str, ...]
    rows: int
    cols: int
    make: Callable[..., NDArray[np.float64]] | None = None
    indices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Product:
    """``scaling * B @ A``, with A of shape (rank, cols) and B of shape (rows, rank)."""

    a: Factor
    b: Factor
    scaling: float

    @property
    def rows(self) -> int:
        return self.b.rows

    @property
    def cols(self) -> int:
        return self.a.cols

    @property
    def rank(self) -> int:
        return self.a.rows


@dataclass(frozen=True)
class Sum:
    """A sum of products of one shape; its rank is that of the concatenated factors."""

    products: tuple[Product, ...]

    @property
    def rows(self) -> int:
        return self.products[0].rows

    @property
    def cols(self) -> int:
        return self.products[0].cols

    @property
    def rank(self) -> int:
        return sum(product.rank for product in self.products)


@dataclass(frozen=True)
class Whole:
    """``scaling * W``, of a matrix that stands in the file as it is."""

    factor: Factor
    scaling: float = 1.0

    @property
    def rows(self) -> int:
        return self.factor.rows

    @property
    def cols(self) -> int:
        return self.factor.cols

    @property
    def rank(self) -> int:
        return min(self.rows, self.cols)


@dataclass(frozen=True)
class Kronecker:
    """The Kronecker product of two updates: its singular values are all products of theirs."""

    left: Sum | Whole
    right: Sum | Whole

    @property
    def rows(self) -> int:
        return self.left.rows * self.right.rows

    @property
    def cols(self) -> int:
        return self.left.cols * self.right.cols

    @property
    def rank(self) -> int:
        return self.left.rank * self.right.rank


Update = Sum | Whole | Kronecker


@dataclass(frozen=True)
class Matrix:
    """One row of the metrics table: a weight update, or one scale of it.

    Attributes:
        scale: One of SCALES.
        group: Which of the scale's groups, from 0; for "layer" and "total" the number of the layer, None without one.
        module: Last name of the module ("query").
        name: Dotted path of the module in the base model. What a terminal acts on is written as escapes, in ``module``
            too: it goes into tables, figures and messages from here.
        update: Its factors; ``update.rank``, an upper bound of its rank, is how many singular values it is given.
    """

    scale: str
    group: int | None
    module: str
    name: str
    update: Update

    def __post_init__(self) -> None:
        for field in ("module", "name"):
            object.__setattr__(self, field, printable(getattr(self, field)))


class Contents(NamedTuple):
    """What an adapter file holds.

    Attributes:
        matrices: The updates, in table order.
        unknown: Names of tensors that nothing explains.
        notes: What a reader of the spectra must know, such as what the update is relative to; a sentence each.
    """

    matrices: list[Matrix]
    unknown: list[str]
    notes: list[str]


def contents(matrices: Iterable[Matrix], unknown: Iterable[str], notes: Iterable[str] = ()) -> Contents:
    """Matrices in table order: by scale, then by name with numbers in order."""
    in_order = sorted(matrices, key=lambda m: (SCALES.index(m.scale), natural_key(m.name)))
    return Contents(in_order, sorted(unknown, key=natural_key), list(notes))
