"""RandLoRA as PEFT saves it: random bases that all modules share, and scales of each for every module.

``base_model.randlora_A`` (r, 1, smallest) and ``base_model.randlora_B`` (largest, bases, r) are frozen, and
``<module>.randlora_lambda`` (r, n), ``randlora_gamma`` (n, least) trained, with the lesser of a weight's two sizes
``least``; PEFT repeats the bases under each module. The update is randlora_alpha / r times the product of B and of A
scaled by both, in the order of the flattened axes, transposed where a weight has fewer outputs than inputs
(peft/tuners/randlora/layer.py). The greater size is known from the base alone.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.base import base_shape, needed_base
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix, shared
from msplora_analysis.formats.helpers.settings import needed_count, needed_number
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Whole, contents
from msplora_analysis.options import Options

_COPY = r".+\.randlora_[AB](?:\.[^.]+)?"
_PARTS = ("randlora_lambda", "randlora_gamma")


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    shapes, rank, alpha = file.shapes, needed_count(config, "r"), needed_number(config, "randlora_alpha")
    modules, unknown = group_parts(shapes, config, _PARTS)
    a, b = (shared(shapes, f"randlora_{factor}", unknown) for factor in "AB")
    if a is None or b is None:
        raise AnalysisError(
            "no randlora_A and randlora_B in the file: they are drawn anew where save_projection is false; load the "
            "adapter in PEFT, set save_projection to true and save it again"
        )
    of_base = needed_base(file, modules, "RandLoRA cuts its bases to the sizes of the weights")
    unknown = [key for key in unknown if not re.fullmatch(_COPY, key)]
    _, in_a, least = expect_shape(shapes, a, rank, None, None)
    most, in_b, _ = expect_shape(shapes, b, None, None, rank)
    matrices = []
    for name, parts in modules.items():
        scales, columns = (parts[part] for part in _PARTS)
        stored = base_shape(file, of_base[name])
        rows, cols = stored[::-1] if config.get("fan_in_fan_out") else stored
        _, bases = expect_shape(shapes, scales, rank, None)
        expect_shape(shapes, columns, bases, min(rows, cols))
        enough = (in_a == 1 or in_a >= bases) and in_b >= bases
        if not enough or min(rows, cols) > least or max(rows, cols) > most:
            raise AnalysisError(
                f"tensors {a} and {b} of shapes {list(shapes[a])} and {list(shapes[b])} have no {bases} bases of "
                f"{[rows, cols]}, the shape of {name}; is it another model?",
                "base",
            )
        factor = Factor((a, b, scales, columns), rows, cols, partial(_update, rows=rows, cols=cols))
        matrices.append(layer_matrix(name, Whole(factor, alpha / rank)))
    return contents(matrices, unknown)


def _update(
    a: NDArray[Any], b: NDArray[Any], scales: NDArray[Any], columns: NDArray[Any], rows: int, cols: int
) -> NDArray[np.float64]:
    bases, least = columns.shape
    inner = a[:, :bases, :least] * scales.astype(np.float64)[:, :, None] * columns.astype(np.float64)
    outer = b[: max(rows, cols), :bases].astype(np.float64)
    product: NDArray[np.float64] = outer.reshape(len(outer), -1) @ inner.reshape(-1, least)
    return product if least == cols else product.T


FORMAT = Format(
    name="RandLoRA",
    read=read,
    peft_types=("RANDLORA",),
    takes_base=lambda config: True,
    why_no_lora="its update sums random bases up to full rank",
)
