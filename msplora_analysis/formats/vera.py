"""VeRA and PVeRA as PEFT saves them: two projections that all modules share, two vectors for each.

``base_model.vera_A`` (r, largest in) and ``base_model.vera_B`` (largest out, r) are random and
frozen; a module uses their first columns and rows, and trains ``<name>.vera_lambda_d`` (r) and
``vera_lambda_b`` (out). The update is diag(b) B diag(d) A (Kopiczko et al. 2023, arXiv 2310.11454,
eq. 2). How many columns a module uses is not in the file; the base tells it, where one is given.
In PVeRA the second half of A and d is the logarithm of a variance, by which training samples; the
first half is what PEFT merges.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.opening import BASE
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.base import base_shape, needed_base
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix, shared
from msplora_analysis.formats.names import module_of
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Shape, Sum, contents
from msplora_analysis.options import Options

_PREFIXES = {"VERA": "vera", "PVERA": "pvera"}
# Last names of modules that read one input, so that they have the same number of columns. Not q, k and v: a model
# with cross-attention calls its own so.
_SAME_INPUT = (
    {"query", "key", "value"},
    {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    {"wi_0", "wi_1"},
)
_OF_TWO_INPUTS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)  # queries of one, keys and values of another


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    shapes, prefix = file.shapes, _PREFIXES[config["peft_type"]]
    names = [f"{prefix}_{part}" for part in ("lambda_b", "lambda_d")]
    modules, unknown = group_parts(shapes, config, names)
    a, b = (shared(shapes, f"{prefix}_{factor}", unknown) for factor in "AB")
    if a is None or b is None:
        raise AnalysisError(
            f"no {prefix}_A and {prefix}_B in the file: they are drawn anew, for the sizes of the base model, where "
            "save_projection is false; load the adapter in PEFT, set save_projection to true and save it again"
        )
    stored, cols = expect_shape(shapes, a, None, None)
    largest, rank = expect_shape(shapes, b, None, stored // 2 if prefix == "pvera" else stored)
    bases = needed_base(file, modules, "VeRA's input sizes") if file.base is not None else {}
    if not bases:
        _check_inputs({name: shapes[parts[names[0]]] for name, parts in modules.items()}, cols)

    matrices = []
    for name, parts in modules.items():
        lambda_b, lambda_d = (parts[part] for part in names)
        (rows,) = expect_shape(shapes, lambda_b, None)
        expect_shape(shapes, lambda_d, stored)
        if rows > largest:
            raise AnalysisError(f"tensor {lambda_b} has {rows} values, but {b} only {largest} rows")
        used = _inputs(file, bases[name], rows, cols, bool(config.get("fan_in_fan_out"))) if bases else cols
        product = Product(
            Factor((a, lambda_d), rank, used, partial(_scaled, rows=rank, cols=used)),
            Factor((b, lambda_b), rows, rank, partial(_scaled, rows=rows, cols=rank)),
            1.0,
        )
        matrices.append(layer_matrix(name, Sum((product,))))
    notes = (
        []
        if bases
        else [
            f"the input sizes of modules are not in a VeRA file: {cols}, the width of {prefix}_A, is taken for all "
            f"({', '.join(sorted({module_of(name) for name in modules}))})"
        ]
    )
    if prefix == "pvera":
        notes.append("PVeRA samples its update in training: the spectra are of the mean")
    return contents(matrices, unknown, notes)


def _scaled(values: NDArray[Any], scales: NDArray[Any], rows: int, cols: int) -> NDArray[np.float64]:
    return np.multiply(values[:rows, :cols], scales[:rows, None], dtype=np.float64)


def _inputs(file: TensorFile, base: str, rows: int, most: int, turned: bool) -> int:
    """The columns of the base's weight of a module with this many rows."""
    stored = base_shape(file, base)
    outputs, inputs = stored[::-1] if turned else stored
    if outputs != rows or inputs > most:
        raise AnalysisError(
            f"tensor {base.removeprefix(BASE)} of the base has shape {list(stored)}, its update {rows} rows and "
            f"at most {most} columns; is it another model?",
            "base",
        )
    return inputs


def _check_inputs(modules: Mapping[str, Shape], cols: int) -> None:
    """The modules, with the shapes of their lambda_b, must be such as read one input.

    Those of another, or of other stages of the model, would have fewer columns of A.
    """
    outputs: dict[str, Shape] = {}
    for name, shape in modules.items():
        if outputs.setdefault(module_of(name), shape) != shape:
            raise _undetermined(f"modules called {module_of(name)} have different sizes", cols)
    kinds = sorted(outputs)
    if len(kinds) > 1:
        if not any(set(kinds) <= same for same in _SAME_INPUT):
            raise _undetermined(f"the modules are {', '.join(kinds)}", cols)
        if crossed := next(filter(_OF_TWO_INPUTS.search, modules), None):
            raise _undetermined(f"{crossed} may read another input than the rest", cols)
    elif len(places := {re.sub(r"[0-9]+", "", name) for name in modules}) > 1:
        raise _undetermined(f"modules called {kinds[0]} stand in {len(places)} places of the model", cols)


def _undetermined(what: str, cols: int) -> AnalysisError:
    return AnalysisError(
        f"{what}; which of them have {cols} inputs, and which fewer, is not in a VeRA file, and the update depends on "
        "it: give the model that it was trained on as base=",
        "base",
    )


FORMAT = Format(name="VeRA", read=read, peft_types=tuple(_PREFIXES), takes_base=lambda config: True)
