"""The model before training, beside an adapter or a checkpoint: which of its weights is whose, and of what shape."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.opening import BASE
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.updates import Factor

NO_BASE = "give the model that it was trained on as base="
"""What the error of an update says that needs the base, where none is given."""


# Beside weights of 4 or 8 bits: bitsandbytes, GPTQ and AWQ, compressed-tensors, fp8 in blocks.
_QUANTISED = re.compile(r".+\.(?:absmax|SCB|qweight|weight_packed|weight_scale(?:_inv)?)")


def check_not_quantised(names: Iterable[str], what: str) -> None:
    """Raise AnalysisError if a model's weights are quantised: as they stand in the file they are no weights."""
    if found := next(filter(_QUANTISED.fullmatch, names), None):
        raise AnalysisError(
            f"{what} is quantised (it has {found.removeprefix(BASE)}): give the model as it was before, or save it "
            "with weights of 16 or 32 bits (in transformers: model.dequantize(), then save_pretrained)"
        )


def align(tuned: Collection[str], base: Collection[str]) -> dict[str, str]:
    """The base's name of each tensor that it has: the same, or without or with one prefix that all share.

    A model with a head calls its body "bert." or "model."; the body alone has no such prefix.

    Raises:
        AnalysisError: No prefix, or more than one, makes the most names agree.
    """
    votes: Counter[tuple[str, str]] = Counter()  # (prefix of the checkpoint, prefix of the base)
    for name in tuned:
        votes.update((prefix, "") for prefix in _prefixes(name) if name.removeprefix(prefix) in base)
    for name in base:
        votes.update(("", prefix) for prefix in _prefixes(name) if prefix and name.removeprefix(prefix) in tuned)
    if not votes:
        raise AnalysisError(
            f"no weight of the checkpoint ({min(tuned, default='it has none')}) is in the base "
            f"({min(base, default='it has none')}); is it another model?"
        )
    most = max(votes.values())
    best = sorted(prefixes for prefixes, count in votes.items() if count == most)
    if len(best) > 1 and ("", "") not in best:
        prefixes = " or ".join(ours or theirs for ours, theirs in best)
        raise AnalysisError(f"the checkpoint's names fit the base's by more than one prefix: {prefixes}")
    ours, theirs = ("", "") if ("", "") in best else best[0]
    return {
        name: theirs + name.removeprefix(ours)
        for name in tuned
        if name.startswith(ours) and theirs + name.removeprefix(ours) in base
    }


def _prefixes(name: str) -> list[str]:
    """Every path that leads to a tensor: "", "bert.", "bert.encoder.", ..."""
    return ["", *(name[: match.end()] for match in re.finditer(r"\.", name))]


def needed_base(file: TensorFile, modules: Iterable[str], why: str) -> dict[str, str]:
    """The tensor of the base's weight of each module, as ``file`` reads it.

    Args:
        file: The adapter, with its base if one is given.
        modules: Names of adapted modules.
        why: What of the update needs it, for the error that it is not there.

    Raises:
        AnalysisError: No base is given, or it does not have one of the weights.
    """
    if file.base is None:
        raise AnalysisError(f"{why}: {NO_BASE}", "base")
    check_not_quantised(file.base, "the base")
    wanted = {f"{module}.weight": module for module in modules}
    found = align(wanted, [name.removeprefix(BASE) for name in file.base])
    if lost := next((name for name in wanted if name not in found), None):
        raise AnalysisError(f"{wanted[lost]} is adapted, and has no weight in the base; is it another model?", "base")
    if empty := next((name for name in found.values() if 0 in file.base[BASE + name]), None):
        raise AnalysisError(f"tensor {empty} of the base has shape {list(file.base[BASE + empty])}: empty", "base")
    return {module: BASE + found[name] for name, module in wanted.items()}


def base_shape(file: TensorFile, tensor: str) -> tuple[int, int]:
    """Rows and columns of a weight of the base as it is stored, the further axes of a convolution flattened."""
    assert file.base is not None
    rows, *others = file.base[tensor] or (0,)
    return rows, math.prod(others)


def base_factor(file: TensorFile, tensor: str, rows: int, cols: int, *, transposed: bool = False) -> Factor:
    """The base's weight as the matrix (rows, cols) that an update changes; ``transposed`` where it is stored so."""
    if base_shape(file, tensor) != ((cols, rows) if transposed else (rows, cols)):
        raise AnalysisError(
            f"tensor {tensor.removeprefix(BASE)} of the base has shape {list(base_shape(file, tensor))}, its update "
            f"{[rows, cols]}; is it another model?",
            "base",
        )
    return Factor((tensor,), rows, cols, partial(_weight, transposed=transposed))


def _weight(tensor: NDArray[Any], transposed: bool) -> NDArray[np.float64]:
    matrix = tensor.reshape(len(tensor), -1).astype(np.float64)
    return matrix.T if transposed else matrix
