"""PEFT's methods whose update is the base's weight, scaled place by place: HiRA and (IA)³; they need the base.

HiRA: ``<module>.hira_A`` (r, in) and ``hira_B`` (out, r); the update is W ∘ (B A) (peft/tuners/hira/layer.py). (IA)³:
``<module>.ia3_l`` of the outputs (out, 1), or of the inputs (1, in) of feed-forward modules; the update is W with rows
or columns times l - 1 (peft/tuners/ia3/layer.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.base import base_factor, base_shape, needed_base
from msplora_analysis.formats.helpers.parts import Parts, expect_shape, group_parts, layer_matrix
from msplora_analysis.formats.helpers.structures import joined
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Whole, contents
from msplora_analysis.options import Options

Floats = NDArray[np.float64]

_PARTS = {"HIRA": ("hira_A", "hira_B"), "IA3": ("ia3_l",)}
_WHY = {"HIRA": "HiRA multiplies the base's weight, place by place, by B A", "IA3": "(IA)³ scales the base's weight"}


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    kind = config["peft_type"]
    modules, unknown = group_parts(file.shapes, config, _PARTS[kind])
    bases = needed_base(file, modules, _WHY[kind])
    turned = bool(config.get("fan_in_fan_out"))
    make = _hira if kind == "HIRA" else _ia3
    updates = {name: make(parts, bases[name], file, turned) for name, parts in modules.items()}
    return contents((layer_matrix(name, update) for name, update in updates.items()), unknown)


def _hira(parts: Parts, base: str, file: TensorFile, turned: bool) -> Whole:
    a, b = parts["hira_A"], parts["hira_B"]
    rank, cols = expect_shape(file.shapes, a, None, None)
    rows, _ = expect_shape(file.shapes, b, None, rank)
    factors = Factor((a,), rank, cols), Factor((b,), rows, rank)
    return _scaled(factors, lambda a, b: b @ a, base, file, (rows, cols), turned)


def _ia3(parts: Parts, base: str, file: TensorFile, turned: bool) -> Whole:
    scales = parts["ia3_l"]
    shape = file.shapes[scales]
    rows, cols = base_shape(file, base)[:: -1 if turned else 1]
    length, axes = max(shape, default=0), [size for size in shape if size != 1]
    by_row = len(shape) > 1 and shape[1] == 1
    if len(axes) > 1 or length != (rows if by_row else cols):
        raise AnalysisError(
            f"tensor {scales} has shape {list(shape)}, the base's weight {[rows, cols]}; is it another model?", "base"
        )
    vector = Factor((scales,), rows if by_row else 1, 1 if by_row else cols)
    return _scaled((vector,), lambda scale: scale - 1, base, file, (rows, cols), turned)


def _scaled(
    factors: tuple[Factor, ...],
    scales: Callable[..., Floats],
    base: str,
    file: TensorFile,
    shape: tuple[int, int],
    turned: bool,
) -> Whole:
    """The base's weight times, place by place, what ``scales`` makes of the factors."""
    weight = base_factor(file, base, *shape, transposed=turned)
    return Whole(joined((weight, *factors), *shape, lambda weight, *values: weight * scales(*values)))


FORMAT = Format(
    name="HiRA and (IA)³",
    read=read,
    peft_types=tuple(_PARTS),
    takes_base=lambda config: True,
    why_no_lora="its update is the base's weight, scaled place by place",
)
