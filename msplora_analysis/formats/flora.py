"""FLoRA as its released code names it: a Tucker core ``<module>.flora_layer.param_G`` and a factor of each axis.

``param_0`` (in, r0), ``param_1`` (out, r1), and of convolutions ``param_2`` (height, r2), ``param_3`` (width, r3), ...
The update is scale * G ×₀ P0 ×₁ P1 ×₂ P2 ... ("FLoRA: Low-Rank Core Space for N-dimension";
SJTU-DeepVisionLab/FLoRA, flora/layers.py). As a matrix (out, in · kernel) it is P1 times G and the other factors, so
that its rank is at most r1.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix, required
from msplora_analysis.formats.helpers.settings import number
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Sum, contents
from msplora_analysis.options import Options

_NEEDED, _KERNEL = ("param_G", "param_0", "param_1"), ("param_2", "param_3", "param_4")
_LAYER = "flora_layer"
_UNSCALED = (
    "a FLoRA file does not hold its scale: the spectra are of the update without it; to have it, put "
    '{"scale": ...} into an adapter_config.json beside the file'
)


def _has_cores(names: Collection[str]) -> bool:
    return any(name.endswith(f"{_LAYER}.param_G") for name in names)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    shapes, scale = file.shapes, number(config, "scale", 1)
    modules, unknown = group_parts(shapes, config, _NEEDED, _KERNEL)
    matrices = []
    for unit, parts in modules.items():
        core = parts["param_G"]
        ranks = expect_shape(shapes, core, *[None] * (len(parts) - 1))
        factors = required(parts, *(f"param_{i}" for i in range(len(ranks))))
        lengths = [expect_shape(shapes, factor, None, rank)[0] for factor, rank in zip(factors, ranks, strict=True)]
        inputs, rows, *kernel = lengths
        inner = Factor((core, factors[0], *factors[2:]), ranks[1], inputs * math.prod(kernel), _all_but_outputs)
        product = Product(inner, Factor((factors[1],), rows, ranks[1]), scale)
        matrices.append(layer_matrix(unit.removesuffix(f".{_LAYER}"), Sum((product,))))
    return contents(matrices, unknown, [] if "scale" in config else [_UNSCALED])


def _all_but_outputs(core: NDArray[Any], inputs: NDArray[Any], *kernel: NDArray[Any]) -> NDArray[np.float64]:
    """(r1, in · kernel): the core times every factor but that of the outputs."""
    product = np.moveaxis(core.astype(np.float64), 1, 0)  # (r1, r0, r2, ...)
    for factor in (inputs, *kernel):
        product = np.tensordot(product, factor.astype(np.float64), (1, 1))  # its axis goes to the end
    return product.reshape(len(product), -1)


FORMAT = Format(
    name="FLoRA",
    read=read,
    lone=_has_cores,
    recognises=lambda config, file: not config.get("peft_type") and _has_cores(file.shapes),
    why_no_lora=lambda config, shapes, matrices: (
        None if "scale" in config else "the file does not hold its scale, on which the update depends"
    ),
)
