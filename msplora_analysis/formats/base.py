"""What every adapter format gives: matrices, and how each is made from the tensors of the file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import natural_key

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

Unit = TypeVar("Unit", bound=Hashable)

PREFIX = "base_model.model."
SCALES = ("global", "mid", "layer", "total")

# Heads that PEFT trains in full for classification and question answering, and names or not.
_HEADS = ("classifier", "score", "qa_outputs")
# Input and output embeddings of transformers models, which PEFT saves whole after a resize.
_EMBEDDINGS = (
    *("embed_tokens", "embed_in", "embed_out", "lm_head", "shared"),
    *("word_embeddings", "tok_embeddings", "wte", "decoder"),
)


@dataclass(frozen=True)
class Factor:
    """A matrix of shape (rows, cols), made from tensors of the file.

    Without ``make`` it is the one tensor named, its further axes flattened. ``make`` is a function
    of the tensors named, each an array of its own shape and type; it gives a new float64 array.
    """

    tensors: tuple[str, ...]
    rows: int
    cols: int
    make: Callable[..., NDArray[np.float64]] | None = None


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

    ``update.rank``, an upper bound of its rank, is how many singular values it is given.
    """

    scale: str
    group: int | None
    module: str
    name: str
    update: Update


class Contents(NamedTuple):
    """What an adapter file holds.

    ``unknown``: tensor names that nothing explains. ``notes``: what a reader of the spectra must
    know about this adapter, such as what its update is relative to; a sentence each.
    """

    matrices: list[Matrix]
    unknown: list[str]
    notes: list[str]


def contents(matrices: Iterable[Matrix], unknown: Iterable[str], notes: Iterable[str] = ()) -> Contents:
    """Matrices in table order: by scale, then by name with numbers in order."""
    in_order = sorted(matrices, key=lambda m: (SCALES.index(m.scale), natural_key(m.name)))
    return Contents(in_order, sorted(unknown, key=natural_key), list(notes))


def module_of(name: str) -> str:
    """Last name of a module that is not a number: "query"; "to_out" for "to_out.0"."""
    return next((part for part in reversed(name.split(".")) if not _is_number(part)), name)


def stack_and_layer(name: str) -> tuple[str, int | None]:
    """The path before the first component that is a number, and that number.

    Digits inside other components do not count: "wav2vec2.encoder.layers.3.k_proj" is layer 3 of
    "wav2vec2.encoder.layers". A name without a number is a stack of its own, without a layer.
    """
    components = name.split(".")
    for i, component in enumerate(components):
        if _is_number(component):
            return ".".join(components[:i]), int(component)
    return name, None


def pair_factors(
    shapes: Shapes, config: Config, parse: Callable[[str], tuple[Unit, str] | None]
) -> tuple[dict[Unit, tuple[str, str]], list[str]]:
    """Sort tensor names into pairs (A, B) by what they adapt, and names that nothing explains.

    ``parse`` takes a tensor name without PREFIX and gives what it belongs to and "A" or "B", or
    None if it is no factor. Raises AnalysisError for a factor that is alone or there twice.
    """
    factors: dict[Unit, dict[str, str]] = {}
    unknown = []
    for key in shapes:
        name = key.removeprefix(PREFIX)
        parsed = parse(name)
        if parsed is not None:
            unit, factor = parsed
            other = factors.setdefault(unit, {}).setdefault(factor, key)
            if other != key:
                raise AnalysisError(
                    f"tensors {other} and {key} are the same factor {factor}; save one adapter per file"
                )
        elif not trained_in_full(name, config):
            unknown.append(key)

    for pair in factors.values():
        for factor, missing in (("A", "B"), ("B", "A")):
            if missing not in pair:
                raise AnalysisError(f"tensor {pair[factor]} has no factor {missing} beside it; save the adapter again")
    return {unit: (pair["A"], pair["B"]) for unit, pair in factors.items()}, unknown


def make_product(a: str, b: str, shapes: Shapes, alpha: float, config: Config) -> Product:
    """The product of a pair of factors, scaled by alpha / r, or alpha / sqrt(r) with rsLoRA.

    rsLoRA: Kalajdzievski 2023, arXiv 2312.03732. Raises AnalysisError unless the shapes fit.
    """
    shape_a, shape_b = shapes[a], shapes[b]
    for name, shape in ((a, shape_a), (b, shape_b)):
        if len(shape) < 2 or 0 in shape:
            raise AnalysisError(
                f"tensor {name} has shape {list(shape)}; expected a matrix that is not empty "
                "(was it saved without gathering its shards?)"
            )
    if shape_a[0] != shape_b[1] or math.prod(shape_b[2:]) != 1:
        raise AnalysisError(
            f"tensors {a} and {b} have shapes {list(shape_a)} and {list(shape_b)}, "
            "which cannot be multiplied as B A; save the adapter again"
        )
    rank = shape_a[0]
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Product(
        Factor((a,), rank, math.prod(shape_a[1:])),
        Factor((b,), shape_b[0], rank),
        scaling,
    )


def number(config: Config, key: str, default: float | None = None) -> float:
    """A number of adapter_config.json; ``default`` where the key is missing or null."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AnalysisError(f"adapter_config.json: {key} must be a number, got {value!r}")
    return value


def table(config: Config, key: str) -> dict[str, int | float]:
    """A ``{name: number}`` of adapter_config.json; empty where the key is missing or null."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise AnalysisError(f"adapter_config.json: {key} must be an object, got {value!r}")
    return {name: number(value, name) for name in value}


def trained_in_full(name: str, config: Config) -> bool:
    """Whether a tensor (without PREFIX) is a weight that was trained and saved as a whole.

    Such are the modules of ``modules_to_save``, heads, biases, embeddings and trainable tokens.
    They have no low-rank factors and are left out of the tables.
    """
    *path, parameter = name.split(".")
    if any(component.startswith(("lora_", "msplora_")) for component in (*path, parameter)):
        return parameter == "bias" and bool(config.get("lora_bias"))
    to_save = config.get("modules_to_save") or ()
    # PEFT takes every module whose path ends in one of these names.
    if any(f"{module}." in name for module in ([to_save] if isinstance(to_save, str) else to_save)):
        return True
    if parameter == "bias" and config.get("bias", "none") != "none":
        return True
    if parameter.startswith("trainable_tokens") or "token_adapter" in path:
        return bool(config.get("trainable_token_indices"))
    if any(head in path for head in _HEADS):
        return True
    while path and path[-1] in ("base_layer", "original_module"):
        path.pop()
    return bool(path) and path[-1] in _EMBEDDINGS and parameter in ("weight", "bias")


def _is_number(component: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", component) is not None
