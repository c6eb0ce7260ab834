"""NOLA: factors that are sums of frozen random bases, with trained coefficients (arXiv 2310.02556).

Where the bases stand in the file, ``<module>.A`` (ka, in, r) with ``nola_alpha`` (ka), ``.B`` (kb, r, out) with
``nola_beta`` (kb), as the vision code saves them (UCDvision/NOLA, vit/NOLA.py, NOLA2), the update is 1 / r times the
transposed product of the two sums. The language code keeps a seed in their place (``coefficients``, ``seed``): the
bases then are what PyTorch drew from it on the device of the training, and are not told by the file.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Sum, contents
from msplora_analysis.options import Options

_PARTS = ("nola_alpha", "nola_beta", "A", "B")


def _is_nola(names: Collection[str]) -> bool:
    return any(name.endswith(".nola_alpha") for name in names) or _drawn(names) is not None


def _drawn(names: Collection[str]) -> str | None:
    """A tensor of coefficients over bases that are not in the file."""
    for name in names:
        path, _, last = name.rpartition(".")
        if last == "coefficients" and f"{path}.seed" in names:
            return name
        if last == "nola_alpha" and f"{path}.A" not in names:
            return name
    return None


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    shapes = file.shapes
    if drawn := _drawn(shapes):
        raise AnalysisError(
            f"tensor {drawn}: NOLA's coefficients of random bases, which PyTorch drew from a seed on the device of the "
            "training and which are not in the file; load the model there and save the weights of lora_A and lora_B"
        )
    modules, unknown = group_parts(shapes, config, _PARTS)
    unknown = [key for key in unknown if not key.endswith(".seed")]
    matrices = []
    for name, parts in modules.items():
        alpha, beta, a, b = (parts[part] for part in _PARTS)
        bases_a, cols, rank = expect_shape(shapes, a, None, None, None)
        bases_b, _, rows = expect_shape(shapes, b, None, rank, None)
        expect_shape(shapes, alpha, bases_a)
        expect_shape(shapes, beta, bases_b)
        inner, outer = Factor((alpha, a), rank, cols, _mixed), Factor((beta, b), rows, rank, _mixed)
        matrices.append(layer_matrix(name, Sum((Product(inner, outer, 1 / rank),))))
    return contents(matrices, unknown)


def _mixed(coefficients: NDArray[Any], bases: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of bases (k, n, m), transposed: (m, n), in float64."""
    mixed: NDArray[np.float64] = np.tensordot(coefficients.astype(np.float64), bases.astype(np.float64), 1).T
    return mixed


FORMAT = Format(
    name="NOLA",
    read=read,
    lone=_is_nola,
    recognises=lambda config, file: not config.get("peft_type") and _is_nola(file.shapes),
    priority=1,
)
