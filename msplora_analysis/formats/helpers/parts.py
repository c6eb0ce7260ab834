"""The tensors of a file, sorted into the parts of each module; what is no part, and of what shape a part must be."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.helpers.settings import check_rank
from msplora_analysis.formats.names import PREFIX, module_of, stack_and_layer
from msplora_analysis.formats.updates import Config, Factor, Matrix, Product, Shape, Shapes, Sum, Update

Parts = dict[str, str]  # part -> tensor name
Unit = TypeVar("Unit", bound=Hashable)

# Input and output embeddings of transformers models, which PEFT saves whole after a resize.
_EMBEDDINGS = (
    *("embed_tokens", "embed_in", "embed_out", "lm_head", "shared"),
    *("word_embeddings", "tok_embeddings", "wte", "decoder"),
)


def group_parts(
    shapes: Shapes, config: Config, needed: Iterable[str], optional: Iterable[str] = ()
) -> tuple[dict[str, Parts], list[str]]:
    """The tensors ``<module>.<part>`` of each module. A part may carry the adapter's name or "weight" behind it.

    Args:
        shapes: Of the file's tensors.
        config: The parsed adapter_config.json, which says what is trained in full.
        needed: Parts that every module must have.
        optional: Parts that it may have.

    Returns:
        Module name to part to tensor name, and the tensor names that nothing explains.

    Raises:
        AnalysisError: A needed part is missing, or one is there twice.
    """
    needed = tuple(needed)
    units, unknown = _sorted(shapes, config, rf"(?P<name>.+)\.(?P<part>{'|'.join((*needed, *optional))})(?:\.[^.]+)?")
    for parts in units.values():
        required(parts, *needed)
    return {name: parts for (name, _), parts in units.items()}, unknown


def pair_factors(
    shapes: Shapes, config: Config, pattern: str
) -> tuple[dict[tuple[str, str], tuple[str, str]], list[str]]:
    """The factors A and B of everything that is adapted.

    Args:
        shapes: Of the file's tensors.
        config: The parsed adapter_config.json, which says what is trained in full.
        pattern: What the name of a factor is without PREFIX, with the groups name, factor (A or B), and scale if any.

    Returns:
        Module name and scale ("" if none) to the tensor names of A and B; and the tensor names that nothing explains.

    Raises:
        AnalysisError: A factor is alone or there twice.
    """
    units, unknown = _sorted(shapes, config, pattern)
    pairs = {unit: required(parts, "factor A", "factor B") for unit, parts in units.items()}
    return {unit: (a, b) for unit, (a, b) in pairs.items()}, unknown


def _sorted(shapes: Shapes, config: Config, pattern: str) -> tuple[dict[tuple[str, str], Parts], list[str]]:
    """Module name and scale to the parts, and the tensor names that nothing explains."""
    units: dict[tuple[str, str], Parts] = {}
    unknown = []
    for key in shapes:
        name = key.removeprefix(PREFIX)
        if match := re.fullmatch(pattern, name):
            found = match.groupdict()
            part = found.get("part") or f"factor {found['factor'].upper()}"
            add_part(units, (found["name"], found.get("scale", "")), part, key)
        elif not trained_in_full(name, config):
            unknown.append(key)
    return units, unknown


def add_part(units: dict[Unit, Parts], unit: Unit, part: str, key: str) -> None:
    """Enter a tensor as a part of a module. Raises AnalysisError if the module has that part already."""
    other = units.setdefault(unit, {}).setdefault(part, key)
    if other != key:
        raise AnalysisError(f"tensors {other} and {key} are the same {part}; save one adapter per file")


def required(parts: Mapping[str, str], *names: str) -> tuple[str, ...]:
    """The tensors of these parts of a module; raises AnalysisError naming one that is missing."""
    for name in names:
        if name not in parts:
            given = next(iter(parts.values()))
            raise AnalysisError(f"tensor {given} has no {name} beside it; save the adapter again")
    return tuple(parts[name] for name in names)


def shared(shapes: Shapes, part: str, unknown: list[str]) -> str | None:
    """The one tensor ``base_model.<part>`` that all modules share, taken out of ``unknown``."""
    pattern = re.compile(rf"base_model\.{part}(?:\.[^.]+)?")
    found = [key for key in shapes if pattern.fullmatch(key)]
    if len(found) > 1:
        raise AnalysisError(f"tensors {found[0]} and {found[1]} are both {part}; save one adapter per file")
    for key in found:
        unknown.remove(key)
    return found[0] if found else None


def is_head(name: str) -> bool:
    """Whether a tensor is of a head that PEFT trains in full for classification and question answering."""
    return not {"classifier", "score", "qa_outputs"}.isdisjoint(name.split(".")[:-1])


def trained_in_full(name: str, config: Config) -> bool:
    """Whether a tensor (without PREFIX) is a weight that was trained and saved as a whole.

    Such are the modules of ``modules_to_save``, heads, biases, embeddings and trainable tokens.
    They have no low-rank factors and are left out of the tables.
    """
    *path, parameter = name.split(".")
    if any(component.startswith(("lora_", "msplora_")) for component in (*path, parameter)):
        return parameter == "bias" and bool(config.get("lora_bias"))
    to_save = config.get("modules_to_save") or ()
    if not isinstance(to_save, (str, list, tuple)):
        raise AnalysisError(f"adapter_config.json: modules_to_save must be a list of names, got {to_save!r}")
    # PEFT takes every module whose path ends in one of these names.
    if any(f"{module}." in name for module in ([to_save] if isinstance(to_save, str) else to_save)):
        return True
    if parameter == "bias" and config.get("bias", "none") != "none":
        return True
    if parameter.startswith("trainable_tokens") or "token_adapter" in path:
        return bool(config.get("trainable_token_indices"))
    if is_head(name):
        return True
    while path and path[-1] in ("base_layer", "original_module"):
        path.pop()
    return bool(path) and path[-1] in _EMBEDDINGS and parameter in ("weight", "bias")


def is_of_the_base(name: str) -> bool:
    """Whether a tensor is a weight of the base model, which PEFT saves, untrained, beside a LoRA of embeddings."""
    return name.endswith(".base_layer.weight")  # a bias of this name was trained


def layer_matrix(name: str, update: Update) -> Matrix:
    """The update of the module ``name``, of scale "layer"."""
    return Matrix("layer", stack_and_layer(name)[1], module_of(name), name, update)


def expect_shape(shapes: Shapes, name: str, *expected: int | None) -> tuple[int, ...]:
    """The shape of a tensor, whose axes must not be empty and, where not None, of the sizes given."""
    shape = shapes[name]
    if len(shape) != len(expected) or any(
        size == 0 or size != (size if other is None else other) for size, other in zip(shape, expected, strict=True)
    ):
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise AnalysisError(f"tensor {name} has shape {list(shape)}; expected [{sizes}]; save the adapter again")
    return shape


def make_product(a: str, b: str, shapes: Shapes, alpha: float, config: Config) -> Product:
    """The product of a pair of factors, scaled by alpha / r, or alpha / sqrt(r) with rsLoRA.

    rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.

    Raises:
        AnalysisError: The shapes do not fit.
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


def one_scale(shapes: Shapes, config: Config, pattern: str, rank: int, alpha: float) -> tuple[list[Matrix], list[str]]:
    """A matrix alpha / rank B A for every pair of factors (see ``pair_factors``), and the tensors that are none.

    Raises:
        AnalysisError: A factor has no partner, or another rank.
    """
    pairs, unknown = pair_factors(shapes, config, pattern)
    matrices = []
    for (name, _), (a, b) in pairs.items():
        product = make_product(a, b, shapes, alpha, {})
        check_rank(a, product.rank, rank)
        matrices.append(layer_matrix(name, Sum((product,))))
    return matrices, unknown


def leading(shape: Shape) -> int | None:
    """The size of the first axis; None where it has none."""
    return shape[0] or None if shape else None


def dora_note(scaling: str) -> str:
    """What a reader of DoRA's spectra must know; ``scaling``: the factor of B A, in the format's words."""
    return (
        f"DoRA (arXiv 2402.09353): the spectra are of its low-rank part, {scaling} * B A; the magnitude vectors that "
        "then rescale the weight are not in them"
    )
