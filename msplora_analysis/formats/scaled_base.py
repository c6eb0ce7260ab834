"""PEFT's methods whose update is the base's weight, scaled place by place: HiRA and (IA)³; they need the base.

HiRA: ``<module>.hira_A`` (r, in, ...) and ``hira_B`` (out, r, ...); the update is W ∘ (B A). Of embeddings they are
``hira_embedding_A`` (r, words) and ``_B`` (dim, r), and the matrix is (dim, words), as LoRA's. (IA)³: ``<name>.ia3_l``
of the outputs (out, 1), or of the inputs (1, in) of feed-forward modules; of convolutions (1, n, 1, 1) for both. The
update is W with rows or columns times l - 1. Source: peft/tuners/hira/layer.py, peft/tuners/ia3/layer.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.base import base_factor, base_shape, needed_base
from msplora_analysis.formats.helpers.parts import group_parts, layer_matrix, make_product, pair_factors
from msplora_analysis.formats.helpers.structures import joined
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Whole, contents
from msplora_analysis.options import Options

Floats = NDArray[np.float64]

Scales = tuple[tuple[Factor, ...], Callable[..., Floats], tuple[int, int]]
"""Factors, what is made of them, and the shape of it: rows and columns."""

_HIRA = r"(?P<name>.+)\.hira_(?:embedding_)?(?P<factor>[AB])(?:\.[^.]+)?"
_WHY = {"HIRA": "HiRA multiplies the base's weight, place by place, by B A", "IA3": "(IA)³ scales the base's weight"}


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    kind = config["peft_type"]
    if kind == "HIRA":
        pairs, unknown = pair_factors(file.shapes, config, _HIRA)
        modules: dict[str, tuple[str, ...]] = {name: parts for (name, _), parts in pairs.items()}
    else:
        found, unknown = group_parts(file.shapes, config, ("ia3_l",))
        modules = {name: (parts["ia3_l"],) for name, parts in found.items()}
    bases = needed_base(file, modules, _WHY[kind])
    updates = {}
    for name, tensors in modules.items():
        turned = bool(config.get("fan_in_fan_out")) or ".hira_embedding_" in tensors[0]
        if kind == "HIRA":
            scales = _hira(tensors[0], tensors[1], file)
        else:
            scales = _ia3(name, tensors[0], bases[name], file, turned, config)
        updates[name] = _scaled(scales, bases[name], file, turned)
    return contents((layer_matrix(name, update) for name, update in updates.items()), unknown)


def _hira(a: str, b: str, file: TensorFile) -> Scales:
    product = make_product(a, b, file.shapes, 1.0, {})
    return (product.a, product.b), lambda a, b: b @ a, (product.rows, product.cols)


def _ia3(name: str, scales: str, base: str, file: TensorFile, turned: bool, config: Config) -> Scales:
    shape = file.shapes[scales]
    rows, cols = base_shape(file, base)[:: -1 if turned else 1]
    length, axes = max(shape, default=0), [size for size in shape if size != 1]
    by_row, kernel = len(shape) > 1 and shape[1] == 1, 1
    if file.base is not None and len(shape) > 2:  # a convolution: its columns are channels with their kernel
        by_row = not _is_feedforward(name, config)
        kernel = math.prod(file.base[base][2:])
    if len(axes) > 1 or length * (1 if by_row else kernel) != (rows if by_row else cols):
        raise AnalysisError(
            f"tensor {scales} has shape {list(shape)}, the base's weight {[rows, cols]}; is it another model?", "base"
        )
    vector = Factor((scales,), length if by_row else 1, 1 if by_row else length)
    return (vector,), lambda scale: np.repeat(scale, 1 if by_row else kernel, axis=1) - 1, (rows, cols)


def _is_feedforward(name: str, config: Config) -> bool:
    modules = config.get("feedforward_modules") or ()
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name.endswith(module) for module in modules)


def _scaled(scales: Scales, base: str, file: TensorFile, turned: bool) -> Whole:
    """The base's weight times, place by place, what is made of the factors."""
    factors, make, shape = scales
    weight = base_factor(file, base, *shape, transposed=turned)
    return Whole(joined((weight, *factors), *shape, lambda weight, *values: weight * make(*values)))


FORMAT = Format(
    name="HiRA and (IA)³",
    read=read,
    peft_types=tuple(_WHY),
    takes_base=lambda config: True,
    why_no_lora="its update is the base's weight, scaled place by place",
)
