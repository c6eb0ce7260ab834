"""How far DoRA moved the magnitudes of a weight from those of the base model.

DoRA (Liu et al. 2024, arXiv 2402.09353): W' = m (W + scaling B A) / ‖W + scaling B A‖, with one magnitude for each
output and the norm over all else. At the start B A = 0 and m = ‖W‖, so m / ‖W‖ - 1 is its relative change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.base import align
from msplora_analysis.formats.lora import magnitude_vectors


class MagnitudeChange(NamedTuple):
    """Mean and largest |m / ‖w‖ - 1| over the outputs of a weight that are not zero in the base."""

    mean: float
    largest: float


def magnitude_note(file: TensorFile, base: TensorFile, config: Mapping[str, Any]) -> str:
    """One sentence on the magnitudes of all modules of a DoRA adapter, as PEFT saves it."""
    vectors = magnitude_vectors(file.shapes)
    of_base = align([f"{module}.weight" for module in vectors], base.shapes)
    changes = {}
    for module, name in vectors.items():
        if (weight := of_base.get(f"{module}.weight")) is None:
            raise AnalysisError(f"tensor {name} belongs to a module that the base does not have; is it another model?")
        changes[module] = magnitude_change(
            file.read(name),
            base.read(weight),
            name=name,
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            embedding="lora_embedding" in "".join(key for key in file.shapes if f"{module}." in key),
        )
    mean = float(np.nanmean([change.mean for change in changes.values()]))
    most = max(changes, key=lambda module: changes[module].largest)
    return (
        f"DoRA moved the magnitudes of the base's weights by {mean:.2%} in the mean, "
        f"at most {changes[most].largest:.2%} (in {most})"
    )


def magnitude_change(
    magnitude: ArrayLike, weight: ArrayLike, *, name: str, fan_in_fan_out: bool = False, embedding: bool = False
) -> MagnitudeChange:
    """Relative change of DoRA's magnitudes against the base's weight.

    Args:
        magnitude: As PEFT saves it, (out,) or with further axes of one element, as convolutions have.
        weight: The base's, (out, in), (out, in, height, width), or (in, out) with ``fan_in_fan_out``.
        name: Tensor name of the magnitude, for the error of sizes that do not fit.
        fan_in_fan_out: Whether the weight is stored transposed.
        embedding: The weight is (vocabulary, dim); PEFT takes the magnitude of each of its dim columns.

    Raises:
        AnalysisError: The sizes do not fit.
    """
    m: NDArray[np.float64] = np.asarray(magnitude, dtype=np.float64).ravel()
    w = np.asarray(weight)
    outputs = np.moveaxis(w, 1, 0) if fan_in_fan_out or embedding else w
    rows = outputs.reshape(len(outputs), -1)
    if len(m) != len(rows):
        raise AnalysisError(
            f"tensor {name} has {len(m)} magnitudes, the base's weight {len(rows)} outputs; is it another model?"
        )
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64, casting="unsafe"))
    present = norms > 0  # rows of zeros, such as padding, have no relative change
    if not present.any():
        return MagnitudeChange(float("nan"), float("nan"))
    change = np.abs(m[present] / norms[present] - 1)
    return MagnitudeChange(float(change.mean()), float(change.max()))
