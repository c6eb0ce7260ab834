"""Adapters beside the weights they were trained on: how large the update is, and what it adds to the spectrum.

Intruder dimensions (Shuttleworth et al. 2024, arXiv 2410.21228, algorithm 1): of the left singular vectors of
W + ΔW with the k largest singular values, those whose cosine with every left singular vector of W is below epsilon.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.opening import open_adapter
from msplora_analysis.compute.linalg.spectra import value
from msplora_analysis.compute.measures.metrics import Array
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.opening import open_checkpoint
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats import read_contents
from msplora_analysis.formats.helpers.base import align
from msplora_analysis.formats.updates import Kronecker, Matrix, Sum, Update
from msplora_analysis.options import Options, Progress
from msplora_analysis.tables.columns import KEYS

if TYPE_CHECKING:
    import pandas as pd

LEADING, EPSILON = 10, 0.5


def measure(
    adapters: Sequence[Adapter], base: Path, options: Options | None = None, progress: Progress | None = None
) -> pd.DataFrame:
    """One row per adapter and adapted weight: key columns, ratio, intruders, examined, cosine.

    ratio: ‖ΔW‖₂ / ‖W‖₂. intruders: of ``examined`` leading directions. cosine: the lowest of their
    largest cosines. A full SVD of W and one of each W + ΔW are computed: seconds at 1024 columns, a
    minute or so at 4096. Raises AnalysisError if a weight is missing or of another shape.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        weights = stack.enter_context(open_checkpoint(base))
        options = replace(options or Options(), base=str(base))
        opened = [stack.enter_context(open_adapter(adapter, options)) for adapter in adapters]
        updates: dict[str, list[tuple[int, Matrix]]] = {}
        for index, (adapter, file) in enumerate(zip(adapters, opened, strict=True)):
            for matrix in _whole_updates(adapter, file, options):
                updates.setdefault(matrix.name, []).append((index, matrix))
        names = align([f"{name}.weight" for name in updates], list(weights.shapes))
        missing = [name for name in updates if f"{name}.weight" not in names]
        if missing:
            warnings.warn(f"{base}: has no weight of {', '.join(missing[:3])} ({len(missing)} in all)", stacklevel=2)
        for done, (name, changes) in enumerate(updates.items()):
            if name in missing:
                continue
            weight = np.array(weights.read(names[f"{name}.weight"]), dtype=np.float64)
            weight = weight.reshape(len(weight), -1)
            vectors = {}
            for index, matrix in changes:
                adapter, file = adapters[index], opened[index]
                update = dense(file, matrix.update)
                turned = bool(adapter.config.get("fan_in_fan_out"))
                original = weight.T if turned else weight
                if original.shape != update.shape:
                    raise AnalysisError(
                        f"base={base}: weight {name} has shape {list(original.shape)}, its update "
                        f"{list(update.shape)}; give the model that was trained, not quantised",
                        "base",
                    )
                if turned not in vectors:
                    vectors[turned] = np.linalg.svd(original, full_matrices=False)[:2]
                rows.append(_keys(adapter, matrix) | compare(original, update, *vectors[turned]))
            if progress:
                progress((done + 1) * len(adapters) / len(updates), len(adapters))
        for file in (weights, *opened):
            file.check_unchanged()
    return pd.DataFrame(rows, columns=[*KEYS, "ratio", "intruders", "examined", "cosine"])


def compare(weight: Array, update: Array, left: Array, sigma: Array) -> dict[str, float]:
    """The measures of one weight (rows, cols), its update, and the weight's left singular vectors and values."""
    changed, values, _ = np.linalg.svd(weight + update, full_matrices=False)
    examined = min(LEADING, len(values))
    cosines = np.abs(left.T @ changed[:, :examined]).max(axis=0)
    return {
        "ratio": float(np.linalg.norm(update, 2) / sigma[0]),
        "intruders": int((cosines < EPSILON).sum()),
        "examined": examined,
        "cosine": float(cosines.min()),
    }


def dense(file: TensorFile, update: Update) -> Array:
    """The update as a matrix (rows, cols), float64."""
    if isinstance(update, Kronecker):
        return np.asarray(np.kron(dense(file, update.left), dense(file, update.right)), dtype=np.float64)
    if isinstance(update, Sum):
        whole = np.zeros((update.rows, update.cols))
        for product in update.products:
            left = np.asarray(value(file, product.b), dtype=np.float64)
            whole += product.scaling * (left @ np.asarray(value(file, product.a), dtype=np.float64))
        return whole
    return update.scaling * np.asarray(value(file, update.factor), dtype=np.float64)


def _whole_updates(adapter: Adapter, file: TensorFile, options: Options) -> list[Matrix]:
    """The update of each layer: the sum of its scales where it has several."""
    try:
        matrices = read_contents(adapter.config, file, options).matrices
    except AnalysisError as error:
        raise AnalysisError(f"{adapter.file}: {error}") from None
    wanted = "total" if any(matrix.scale == "total" for matrix in matrices) else "layer"
    return [matrix for matrix in matrices if matrix.scale == wanted]


def _keys(adapter: Adapter, matrix: Matrix) -> dict[str, Any]:
    of_matrix = {name: getattr(matrix, name) for name in ("scale", "group", "module", "name")}
    return {"run": adapter.run, "step": adapter.step, "epoch": adapter.epoch, **of_matrix}
