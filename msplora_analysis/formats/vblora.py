"""VB-LoRA as PEFT saves it: one bank of vectors, and logits that mix them into A and B of each module.

``base_model.vblora_vector_bank`` (vectors, length) is shared. ``<name>.vblora_logits_A`` (r, in /
length, vectors) and ``vblora_logits_B`` (out / length, r, vectors) choose, for every piece of a
factor, the softmax of the ``topk`` largest logits. The update is B A (Li et al. 2024, arXiv
2405.15179).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix, shared
from msplora_analysis.formats.helpers.settings import needed_count
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Sum, contents
from msplora_analysis.options import Options


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    shapes, topk = file.shapes, needed_count(config, "topk")
    if indices := next((name for name in shapes if name.endswith("_topk_indices")), None):
        raise AnalysisError(
            f"tensor {indices}: VB-LoRA saved with save_only_topk_weights is not supported; "
            "load it in PEFT, set save_only_topk_weights to false and save it again"
        )
    modules, unknown = group_parts(shapes, config, ("vblora_logits_A", "vblora_logits_B"))
    bank = shared(shapes, "vblora_vector_bank", unknown)
    if bank is None:
        raise AnalysisError("no vblora_vector_bank in the file; save the adapter again")
    vectors, length = expect_shape(shapes, bank, None, None)
    if topk > vectors:
        raise AnalysisError(f"adapter_config.json: topk is {topk}, but {bank} has only {vectors} vectors")

    matrices = []
    for name, parts in modules.items():
        a, b = parts["vblora_logits_A"], parts["vblora_logits_B"]
        rank, cols, _ = expect_shape(shapes, a, None, None, vectors)
        rows, *_ = expect_shape(shapes, b, None, rank, vectors)
        product = Product(
            Factor((bank, a), rank, cols * length, partial(_make_a, topk=topk)),
            Factor((bank, b), rows * length, rank, partial(_make_b, topk=topk)),
            1.0,
        )
        matrices.append(layer_matrix(name, Sum((product,))))
    return contents(matrices, unknown)


def _make_a(bank: NDArray[Any], logits: NDArray[Any], topk: int) -> NDArray[np.float64]:
    return _mixed(bank, logits, topk).reshape(len(logits), -1)


def _make_b(bank: NDArray[Any], logits: NDArray[Any], topk: int) -> NDArray[np.float64]:
    rank = logits.shape[1]
    return _mixed(bank, logits, topk).transpose(0, 2, 1).reshape(-1, rank)


def _mixed(bank: NDArray[Any], logits: NDArray[Any], topk: int) -> NDArray[np.float64]:
    """Vectors (..., length), each mixed of those that have the largest of its logits (..., vectors)."""
    chosen = np.argpartition(logits, -topk, axis=-1)[..., -topk:]
    weights = np.take_along_axis(logits, chosen, axis=-1).astype(np.float64)
    weights = np.exp(weights - weights.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed: NDArray[np.float64] = np.einsum("...k,...kl->...l", weights, bank[chosen].astype(np.float64))
    return mixed


FORMAT = Format(name="VB-LoRA", read=read, peft_types=("VBLORA",))
