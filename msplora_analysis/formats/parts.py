"""What the formats of PEFT share: tensors grouped by module, checks of config and shapes, block-diagonal factors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.base import (
    PREFIX,
    Config,
    Matrix,
    Shapes,
    Update,
    module_of,
    number,
    stack_and_layer,
    trained_in_full,
)

Parts = dict[str, str]  # part -> tensor name


def group_parts(
    shapes: Shapes, config: Config, required: Iterable[str], optional: Iterable[str] = ()
) -> tuple[dict[str, Parts], list[str]]:
    """The tensors ``<module>.<part>`` of each module, and names that nothing explains.

    A part may carry the adapter's name or "weight" behind it. Raises AnalysisError for a required
    part that a module lacks, or one that is there twice.
    """
    required = tuple(required)
    part = "|".join((*required, *optional))
    pattern = re.compile(rf"(?P<module>.+)\.(?P<part>{part})(?:\.[^.]+)?")
    modules: dict[str, Parts] = {}
    unknown = []
    for key in shapes:
        name = key.removeprefix(PREFIX)
        if match := pattern.fullmatch(name):
            other = modules.setdefault(match["module"], {}).setdefault(match["part"], key)
            if other != key:
                raise AnalysisError(
                    f"tensors {other} and {key} are both {match['part']} of one module; save one adapter per file"
                )
        elif not trained_in_full(name, config):
            unknown.append(key)
    for parts in modules.values():
        for name in required:
            if name not in parts:
                present = next(iter(parts.values()))
                raise AnalysisError(f"tensor {present} has no {name} beside it; save the adapter again")
    return modules, unknown


def shared(shapes: Shapes, part: str, unknown: list[str]) -> str | None:
    """The one tensor ``base_model.<part>`` that all modules share, taken out of ``unknown``."""
    pattern = re.compile(rf"base_model\.{part}(?:\.[^.]+)?")
    found = [key for key in shapes if pattern.fullmatch(key)]
    if len(found) > 1:
        raise AnalysisError(f"tensors {found[0]} and {found[1]} are both {part}; save one adapter per file")
    for key in found:
        unknown.remove(key)
    return found[0] if found else None


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


def needed_number(config: Config, key: str) -> float:
    """A number of adapter_config.json without which the update cannot be computed."""
    _needed(config, key)
    return number(config, key)


def needed_count(config: Config, key: str) -> int:
    """A positive whole number of adapter_config.json without which the update cannot be computed."""
    _needed(config, key)
    return count(config[key], key)


def count(value: Any, key: str) -> int:
    """``value``, if it is a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AnalysisError(f"adapter_config.json: {key} must be a positive whole number, got {value!r}")
    return value


def by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The first entry whose key matches the end of a module's name, as PEFT's get_pattern_key."""
    for key, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error:
            raise AnalysisError(f"adapter_config.json: the pattern {key!r} is not a regular expression") from None
    return patterns.get(name, default)


def rows_scaled(values: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float64]:
    """diag(scales) @ values, in float64."""
    return np.multiply(values, scales.reshape(-1, 1), dtype=np.float64)


def block_diagonal(values: NDArray[Any], blocks: int) -> NDArray[np.float64]:
    """The (rows, cols * blocks) matrix that has ``values`` (rows, cols), cut into blocks of rows, on its diagonal."""
    rows, cols = values.shape
    full = np.zeros((blocks, rows // blocks, blocks, cols))
    for i, block in enumerate(values.reshape(blocks, -1, cols)):
        full[i, :, i] = block
    return full.reshape(rows, blocks * cols)


def _needed(config: Config, key: str) -> None:
    if config.get(key) is None:
        raise AnalysisError(
            f"adapter_config.json: {key} is missing; without it the update cannot be computed: "
            "use the file that was saved with the weights"
        )
