"""DeLoRA as PEFT saves it: factors whose rows and columns are normalised, under one common strength.

``<name>.delora_A`` (r, in), ``delora_B`` (out, r), ``delora_lambda`` (1) and ``delora_w_norm`` (in),
the column norms of the base weight. The update is lambda / r * B diag(1 / (|b_i| |a_i|)) A
diag(w_norm) (Bini et al. 2025, arXiv 2503.18225), norms below 1e-4 counting as that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Sum, contents
from msplora_analysis.options import Options

_PARTS = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_SMALLEST_NORM = 1e-4


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    shapes = file.shapes
    modules, unknown = group_parts(shapes, config, _PARTS)
    matrices = []
    for name, parts in modules.items():
        a, b, strength, norms = (parts[part] for part in _PARTS)
        rank, cols = expect_shape(shapes, a, None, None)
        rows, _ = expect_shape(shapes, b, None, rank)
        expect_shape(shapes, strength, 1)
        expect_shape(shapes, norms, cols)
        product = Product(Factor((a, norms), rank, cols, _make_a), Factor((b, strength), rows, rank, _make_b), 1 / rank)
        matrices.append(layer_matrix(name, Sum((product,))))
    return contents(matrices, unknown)


def _make_a(a: NDArray[Any], norms: NDArray[Any]) -> NDArray[np.float64]:
    return _normalised(a, axis=1) * norms


def _make_b(b: NDArray[Any], strength: NDArray[Any]) -> NDArray[np.float64]:
    return _normalised(b, axis=0) * strength


def _normalised(values: NDArray[Any], axis: int) -> NDArray[np.float64]:
    exact = values.astype(np.float64)
    normalised: NDArray[np.float64] = exact / np.maximum(
        np.linalg.norm(exact, axis=axis, keepdims=True), _SMALLEST_NORM
    )
    return normalised


FORMAT = Format(name="DeLoRA", read=read, peft_types=("DELORA",))
