"""Full fine-tuning: a model's checkpoint and the model before training, by ``files.opening``.

The update of a weight is its difference to the base's, whole. Weights are what has two axes of more than one element:
linear layers and embeddings as they stand, convolutions (out, in, height, width) as (out, in height width). Biases,
norms and buffers are left out; tensors of several experts are unknown. Both sides are compared as stored: in a file of
bfloat16 the difference holds the rounding of the weights, up to 4e-3 of each, which looks like a broad spectrum. Of a
checkpoint that was merged in 4 bits a note says the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.opening import BASE
from msplora_analysis.files.tensors import FloatArray, TensorFile
from msplora_analysis.formats.helpers.base import align, check_not_quantised
from msplora_analysis.formats.helpers.parts import layer_matrix, trained_in_full
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Matrix, Shape, Shapes, Whole, contents
from msplora_analysis.options import Options

# Tables of words (and outputs over them) grow at their end when tokens are added.
_RESIZED = re.compile(r"(.+\.)?(\w*embed\w*|wte|shared|lm_head|output|decoder)")
_TABLE = re.compile(rf"{_RESIZED.pattern}|(.+\.)?(wpe|relative_attention_bias)")
_BUFFERS = ("position_ids", "token_type_ids", "masked_bias", "inv_freq", "relative_position_index", "attn_mask")

_BLOCK, _SAMPLE = 64, 64  # values that share a scale in 4 bits; blocks that are looked at
_GRID = (
    "weights of the checkpoint have at most 16 values in each block of 64, as of a model that was merged in 4 bits: "
    "the difference to the base holds that rounding too, which looks like a broad spectrum and was not learned"
)


def _recognises(config: Config, file: TensorFile) -> bool:
    return not config.get("peft_type") and any(name.startswith(BASE) for name in file.shapes)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per weight that is in both files, all of scale "layer"."""
    tuned = {name: shape for name, shape in file.shapes.items() if not name.startswith(BASE)}
    base = {name.removeprefix(BASE): shape for name, shape in file.shapes.items() if name.startswith(BASE)}
    found = differences(tuned, base)
    return found._replace(notes=[*found.notes, _GRID]) if _merged_in_4_bits(file, found.matrices) else found


def _merged_in_4_bits(file: TensorFile, matrices: Sequence[Matrix]) -> bool:
    """Whether the first linear weight has at most 16 values in each of its first blocks of 64, as NF4 and FP4 have."""
    shapes = file.shapes
    linear = (
        one.update.factor.tensors[0] for one in matrices if isinstance(one.update, Whole) and not is_table(one.name)
    )
    large = (name for name in linear if len(shapes[name]) == 2 and math.prod(shapes[name]) >= _SAMPLE * _BLOCK)
    name = next(large, None)
    if name is None:
        return False
    blocks = np.sort(file.read_part(name, 0, _SAMPLE * _BLOCK).reshape(_SAMPLE, _BLOCK), axis=1)
    values = 1 + (np.diff(blocks, axis=1) > 0).sum(axis=1)
    return bool((values <= 16).all() and (values > 1).any())


def differences(checkpoint: Shapes, model: Shapes) -> Contents:
    """One matrix per weight that is in a checkpoint and in the model before training, by their shapes."""
    check_not_quantised(checkpoint, "the checkpoint")
    check_not_quantised(model, "the base")
    tuned, base = ({name: shape for name, shape in one.items() if _weight(name, shape)} for one in (checkpoint, model))
    of_base = align(tuned, base)
    matrices: list[Matrix] = []
    unknown: list[str] = []
    heads: list[str] = []
    notes: list[str] = []
    for name, shape in tuned.items():
        other = of_base.get(name)
        stacked = len(shape) == 3 and "experts" in name.split(".")  # (expert, in, out): not a convolution
        if stacked or other is None or (base[other] != shape and _is_head(name)):
            (heads if trained_in_full(name, {}) else unknown).append(name)
            continue
        if base[other] != shape:
            notes.append(_resized(name, shape, base[other]))
        update = _difference(name, BASE + other, shape, base[other])
        matrices.append(layer_matrix(name.removesuffix(".weight"), update))
    if heads:
        notes.append(f"not in the base, or of another shape there, and left out: {', '.join(heads)}")
    if missing := [name for name in base if name not in of_base.values()]:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        notes.append(f"weights of the base that the checkpoint does not have, left out ({len(missing)}): {listed}")
    return contents(matrices, unknown, notes)


def _weight(name: str, shape: Shape) -> bool:
    """Whether a tensor is a matrix, or a convolution: what has rows and columns."""
    last = name.rpartition(".")[2]
    return sum(length > 1 for length in shape) >= 2 and last != "bias" and last not in _BUFFERS


def is_table(name: str) -> bool:
    """Whether a weight is one of embeddings, or of an output over them, by its name."""
    return _TABLE.fullmatch(name.removesuffix(".weight")) is not None


def _is_head(name: str) -> bool:
    """Whether a weight is an output of its task's own, so that the base's may be of another task."""
    return trained_in_full(name, {}) and not _RESIZED.fullmatch(name.removesuffix(".weight"))


def _resized(name: str, shape: Shape, base: Shape) -> str:
    """The note of a table of another length; raises AnalysisError for any other difference of shapes."""
    if shape[1:] != base[1:] or not _RESIZED.fullmatch(name.removesuffix(".weight")):
        raise AnalysisError(f"tensor {name} has shape {list(shape)}, in the base {list(base)}; is it another model?")
    return f"{name} has {shape[0]} rows, in the base {base[0]}: the first {min(shape[0], base[0])} are compared"


def _difference(name: str, other: str, shape: Shape, base: Shape) -> Whole:
    rows = next(i for i, length in enumerate(shape) if length > 1)  # (1, positions, dim) is (positions, dim)
    count = min(shape[rows], base[rows])
    cols = math.prod(shape[rows + 1 :])
    return Whole(Factor((name, other), count, cols, partial(_subtract, rows=count, cols=cols)))


def _subtract(weight: FloatArray, base: FloatArray, rows: int, cols: int) -> NDArray[np.float64]:
    """weight - base of the first rows, in float64, where the difference of two float32 is exact or nearly."""
    difference: NDArray[np.float64] = np.subtract(
        weight.reshape(-1, cols)[:rows], base.reshape(-1, cols)[:rows], dtype=np.float64
    )
    return difference


FORMAT = Format(
    name="full fine-tuning",
    read=read,
    recognises=_recognises,
    reads_values=True,
    priority=-1,  # any file with a base
)
