"""SVFT as its released code names it: ``<module>.svft_layer.u`` (out, n), ``v`` (n, in), and sparse values between.

``s`` are trained, at the places ``s_row``, ``s_col``; the update is u M v with M of s * sigmoid(``gate``) (arXiv
2405.19597; VijayLingam95/SVFT, svft/svft_layers.py). ``s_pre`` (n) are the singular values of the weight
before training. Where fewer than all were kept, u diag(s_pre) v is not that weight: with the base, the spectra are of
u (diag(s_pre) + M) v - W0, what really changed.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.base import base_factor, needed_base
from msplora_analysis.formats.helpers.parts import Parts, expect_shape, layer_matrix
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Whole, contents
from msplora_analysis.options import Options

_LAYER = ".svft_layer."
_NEEDED = ("u", "v", "s", "gate", "s_row", "s_col")
_BEFORE = ("s_pre", "s_pre_row", "s_pre_col")
_NOTE = (
    "SVFT (arXiv 2405.19597): the spectra are of u M v, what training put between the singular vectors of a weight; "
    "where fewer than all of these were kept, base= shows the whole change"
)


def _has_layers(names: Collection[str]) -> bool:
    return any(name.endswith(f"{_LAYER}s") for name in names)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    modules: dict[str, Parts] = {}
    unknown, left = [], 0
    for key, shape in file.shapes.items():
        name, found, part = key.rpartition(_LAYER)
        if found and part not in (*_NEEDED, *_BEFORE):
            unknown.append(key)
        elif found:
            modules.setdefault(name, {})[part] = key
        else:
            left += len(shape) > 1
    bases = needed_base(file, modules, "SVFT") if file.base is not None else {}
    matrices = [layer_matrix(name, _update(parts, file, bases.get(name))) for name, parts in modules.items()]
    notes = [] if bases else [_NOTE]
    if left:
        notes.append(f"a whole model: {left} of its weights are not adapted, and left out")
    return contents(matrices, unknown, notes)


def _update(parts: Parts, file: TensorFile, base: str | None) -> Whole:
    for part in (*_NEEDED, *(("s_pre",) if base else ())):
        if part not in parts:
            given = next(iter(parts.values()))
            raise AnalysisError(
                f"tensor {given} has no {part} beside it: SVFT's update needs singular vectors and the places of its "
                "values; save the whole state_dict of the model"
            )
    u, v, s, gate, row, col = (parts[part] for part in _NEEDED)
    rows, n = expect_shape(file.shapes, u, None, None)
    _, cols = expect_shape(file.shapes, v, n, None)
    (count,) = expect_shape(file.shapes, s, None)
    expect_shape(file.shapes, gate, 1)
    for place in (row, col):
        expect_shape(file.shapes, place, count)
    tensors: tuple[str, ...] = (u, v, s, gate)
    if base:
        base_factor(file, base, rows, cols)  # its shape
        expect_shape(file.shapes, parts["s_pre"], n)
        tensors += (parts["s_pre"], base)
    make = partial(_between, where=f"{file.path}: tensors {row} and {col}")
    return Whole(Factor(tensors, rows, cols, make, (row, col)))


def _between(*tensors: NDArray[Any], where: str) -> NDArray[np.float64]:
    """u M v, and with ``s_pre`` and a base's weight u (diag(s_pre) + M) v - W."""
    *floats, row, col = tensors
    u, v, s, gate, *before = (one.astype(np.float64) for one in floats)
    n = len(v)
    if row.size and not 0 <= min(row.min(), col.min()) <= max(row.max(), col.max()) < n:
        raise AnalysisError(f"{where} name a place outside of the {n} singular vectors; save the model again")
    middle = np.zeros((n, n))
    np.add.at(middle, (row, col), s / (1 + np.exp(-gate)))
    if before:
        middle[np.diag_indices(n)] += before[0]
    update: NDArray[np.float64] = u @ (middle @ v)
    if before:
        update -= before[1].reshape(update.shape)
    return update


FORMAT = Format(
    name="SVFT",
    read=read,
    lone=_has_layers,
    recognises=lambda config, file: not config.get("peft_type") and _has_layers(file.shapes),
    takes_base=lambda config: True,
    why_no_lora="its update is between singular vectors of the weight, and of full rank",
)
