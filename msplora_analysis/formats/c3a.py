"""C3A as PEFT saves it: ``<module>.c3a_kernel`` (out / b, in / b, b), the first rows of circulant blocks b by b.

Block (m, n) of the update has kernel[m, n, (column - row) mod b] / in at each place (peft/tuners/c3a/utils.py, whose
Fourier transforms make the same): a matrix of full rank, all of which is in the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Whole, contents
from msplora_analysis.options import Options


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    modules, unknown = group_parts(file.shapes, config, ("c3a_kernel",))
    matrices = []
    for name, parts in modules.items():
        kernel = parts["c3a_kernel"]
        outputs, inputs, size = expect_shape(file.shapes, kernel, None, None, None)
        update = Whole(Factor((kernel,), outputs * size, inputs * size, _circulant), 1 / (inputs * size))
        matrices.append(layer_matrix(name, update))
    return contents(matrices, unknown)


def _circulant(kernel: NDArray[Any]) -> NDArray[np.float64]:
    outputs, inputs, size = kernel.shape
    at = (np.arange(size) - np.arange(size)[:, None]) % size  # (row, column)
    blocks = kernel.astype(np.float64)[:, :, at]
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3)).reshape(outputs * size, inputs * size)


FORMAT = Format(name="C3A", read=read, peft_types=("C3A",), why_no_lora="its update is circulant and of full rank")
