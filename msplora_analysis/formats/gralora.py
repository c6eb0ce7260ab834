"""GraLoRA as PEFT saves it: k × k blocks, each of a low-rank update of its own.

``<name>.gralora_A`` (k, in / k, r) and ``gralora_B`` (k, r, out / k); the block of input part n and
output part j is the product of r / k columns of A[n] with as many rows of B[j] (Jung et al. 2025,
arXiv 2505.20355). With hybrid_r > 0 a plain pair ``gralora_A_general.weight``,
``gralora_B_general.weight`` is added. All is scaled by alpha / (r + hybrid_r).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix
from msplora_analysis.formats.helpers.settings import needed_count, needed_number
from msplora_analysis.formats.helpers.structures import block_diagonal
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Sum, contents
from msplora_analysis.options import Options

_BLOCKS = ("gralora_A", "gralora_B")
_GENERAL = ("gralora_A_general", "gralora_B_general")


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module; its rank is at most k r + hybrid_r."""
    shapes, alpha = file.shapes, needed_number(config, "alpha")
    hybrid = needed_count(config, "hybrid_r") if needed_number(config, "hybrid_r") else 0
    modules, unknown = group_parts(shapes, config, (*_BLOCKS, *(_GENERAL if hybrid else ())))
    matrices = []
    for name, parts in modules.items():
        a, b = (parts[part] for part in _BLOCKS)
        k, inputs, rank = expect_shape(shapes, a, None, None, None)
        _, _, outputs = expect_shape(shapes, b, k, rank, None)
        if rank % k:
            raise AnalysisError(
                f"tensor {a} has shape {list(shapes[a])}; the last size must be a multiple of the first"
            )
        scaling = alpha / (rank + hybrid)
        products = [
            Product(Factor((a,), k * rank, k * inputs, _make_a), Factor((b,), k * outputs, k * rank, _make_b), scaling)
        ]
        if hybrid:
            general_a, general_b = (parts[part] for part in _GENERAL)
            expect_shape(shapes, general_a, hybrid, k * inputs)
            expect_shape(shapes, general_b, k * outputs, hybrid)
            products.append(
                Product(Factor((general_a,), hybrid, k * inputs), Factor((general_b,), k * outputs, hybrid), scaling)
            )
        matrices.append(layer_matrix(name, Sum(tuple(products))))
    return contents(matrices, unknown)


def _make_a(a: NDArray[Any]) -> NDArray[np.float64]:
    """(k * r, in): every input part has its r columns of A to itself."""
    k, inputs, rank = a.shape
    return block_diagonal(a.transpose(0, 2, 1).reshape(k * rank, inputs), k)


def _make_b(b: NDArray[Any]) -> NDArray[np.float64]:
    """(out, k * r): output part j takes, of the r values of every input part, the j-th r / k."""
    k, rank, outputs = b.shape
    full = np.zeros((k, outputs, k, k, rank // k))  # output part and place, input part, output part, column
    for j, block in enumerate(b.reshape(k, k, rank // k, outputs)):
        full[j, :, :, j] = block.transpose(2, 0, 1)
    return full.reshape(k * outputs, k * rank)


FORMAT = Format(name="GraLoRA", read=read, peft_types=("GRALORA",))
