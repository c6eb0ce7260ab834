"""MiSS (Bone) as PEFT saves it: ``<module>.miss_block`` (r, out), a small block that every r inputs share.

The update is blockᵀ [I I ... I], with r columns of each I, the last cut off where r does not divide the inputs: exactly
of rank r. How many inputs there are is known from the base alone. With init_weights "mini" the block (r, mini_r) is
repeated over the outputs; with "bat" it is one block (r, r) for every r outputs, and acts on the weight too: of each
r by r piece W of the base it makes W B + B. Source: peft/tuners/miss/layer.py and bone/layer.py (arXiv 2409.15371).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.base import base_factor, base_shape, needed_base
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix
from msplora_analysis.formats.helpers.structures import joined
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Sum, Update, Whole, contents
from msplora_analysis.options import Options

_BLOCKS = {"MISS": "miss_block", "BONE": "bone_block"}


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    part = _BLOCKS[config["peft_type"]]
    modules, unknown = group_parts(file.shapes, config, (part,))
    bases = needed_base(file, modules, "MiSS repeats one small block over a weight, as often as its sizes say")
    bat = config.get("init_weights") == "bat"
    make = _bat if bat else _repeated
    updates = {name: make(parts[part], bases[name], file) for name, parts in modules.items()}
    return contents((layer_matrix(name, update) for name, update in updates.items()), unknown)


def _repeated(block: str, base: str, file: TensorFile) -> Update:
    rows, cols = base_shape(file, base)
    rank, width = expect_shape(file.shapes, block, None, None)
    if rank > cols or rows % width:
        raise AnalysisError(
            f"tensor {block} has shape {[rank, width]}, the base's weight {[rows, cols]}, over which it cannot be "
            "repeated; is it another model?",
            "base",
        )
    inputs = Factor((block,), rank, cols, partial(_identities, cols=cols))
    outputs = Factor((block,), rows, rank, partial(_over_outputs, times=rows // width))
    return Sum((Product(inputs, outputs, 1.0),))


def _identities(block: NDArray[Any], cols: int) -> NDArray[np.float64]:
    """(rank, cols): identities side by side, of the rank of a block (rank, ...)."""
    return np.tile(np.eye(len(block)), -(-cols // len(block)))[:, :cols]


def _over_outputs(block: NDArray[Any], times: int) -> NDArray[np.float64]:
    return np.tile(block.astype(np.float64), times).T


def _bat(block: str, base: str, file: TensorFile) -> Update:
    rows, cols = base_shape(file, base)
    blocks, size, _ = expect_shape(file.shapes, block, None, None, None)
    if blocks * size != rows or cols % size or file.shapes[block][2] != size:
        raise AnalysisError(
            f"tensor {block} has shape {list(file.shapes[block])}, the base's weight {[rows, cols]}, which has no such "
            "blocks; is it another model?",
            "base",
        )
    factors = Factor((block,), blocks, size * size), base_factor(file, base, rows, cols)
    return Whole(joined(factors, rows, cols, partial(_blockwise, size=size)))


def _blockwise(blocks: NDArray[np.float64], weight: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """W B + B of every piece W (size, size) of the weight, with the block B of its rows."""
    rows, cols = weight.shape
    pieces = weight.reshape(rows // size, size, cols // size, size)
    square = blocks.reshape(-1, size, size)
    changed = np.einsum("oinj,ojk->oink", pieces, square, optimize=True) + square[:, :, None]
    return changed.reshape(rows, cols)


FORMAT = Format(name="MiSS", read=read, peft_types=tuple(_BLOCKS), takes_base=lambda config: True)
