"""AdaLoRA as its own code saves it: loralib's ``lora_A`` (r, in), ``lora_B`` (out, r), and ``lora_E`` (r, 1).

The update is B diag(E) A times lora_alpha / (ranknum + 1e-5), with r in place of a lora_alpha that is not positive
(Zhang et al. 2023, arXiv 2303.10512; QingruZhang/AdaLoRA, loralib/adalora.py). ``ranknum`` is r and stays so; loralib's
lora_state_dict leaves it out. Pruned components have an E of zero, and singular values of zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix, required
from msplora_analysis.formats.helpers.scales import UNSCALED, why_unscaled
from msplora_analysis.formats.helpers.settings import number
from msplora_analysis.formats.helpers.structures import rows_scaled
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Sum, contents
from msplora_analysis.options import Options

_PARTS = ("lora_A", "lora_B", "lora_E")


def _has_values(names: Collection[str]) -> bool:
    return any(name.endswith(".lora_E") for name in names)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    shapes = file.shapes
    modules, unknown = group_parts(shapes, config, _PARTS, ("ranknum",))
    unknown = [key for key in unknown if key.rpartition(".")[2] != "bias"]
    matrices = []
    for name, parts in modules.items():
        a, b, e = required(parts, *_PARTS)
        rank, cols = expect_shape(shapes, a, None, None)
        rows, _ = expect_shape(shapes, b, None, rank)
        if math.prod(shapes[e]) != rank:
            raise AnalysisError(f"tensor {e} has shape {list(shapes[e])}; expected [{rank}, 1]")
        alpha = number(config, "lora_alpha", 1)
        scaling = alpha if alpha > 0 else float(rank)
        if counted := parts.get("ranknum"):
            if math.prod(shapes[counted]) != 1:
                raise AnalysisError(f"tensor {counted} has shape {list(shapes[counted])}; expected one number")
            inner, scaling = Factor((a, e, counted), rank, cols, _over_ranknum), scaling
        else:
            inner, scaling = Factor((a, e), rank, cols, rows_scaled), scaling / (rank + 1e-5)
        matrices.append(layer_matrix(name, Sum((Product(inner, Factor((b,), rows, rank), scaling),))))
    return contents(matrices, unknown, [] if "lora_alpha" in config else [UNSCALED])


def _over_ranknum(a: NDArray[Any], e: NDArray[Any], ranknum: NDArray[Any]) -> NDArray[np.float64]:
    return rows_scaled(a, e) / (float(ranknum.reshape(())) + 1e-5)


FORMAT = Format(
    name="AdaLoRA's own code",
    read=read,
    lone=_has_values,
    recognises=lambda config, file: not config.get("peft_type") and _has_values(file.shapes),
    why_no_lora=why_unscaled,
    priority=1,  # before loralib, whose names are the same
)
