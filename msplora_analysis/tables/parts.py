"""How alike the parts of a mixture are: their Gram matrix, and how many directions they span."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.adapters.opening import opened
from msplora_analysis.compute.linalg.spectra import load_factors, not_finite
from msplora_analysis.compute.measures.metrics import effective_rank
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats import find_format
from msplora_analysis.formats.updates import Matrix, Sum
from msplora_analysis.options import Options

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ("run", "step", "epoch", "group", "module", "name", "part_i", "part_j", "inner", "cosine", "parts", "span")


def load_parts(paths: StrPath | Iterable[StrPath], *, ignore_unknown: bool = False) -> pd.DataFrame:
    """The parts of mixtures, such as HydraLoRA, MixLoRA and Lily, against each other.

    A router weights them anew for every input, so that no one update is the adapter's. What stays is how alike they
    are: the Gram matrix of the inner products ⟨ΔW_i, ΔW_j⟩ = tr(ΔW_iᵀ ΔW_j), from the factors.

    Args:
        paths: Adapters, or folders of them.
        ignore_unknown: Leave out tensors that no format explains, instead of raising.

    Returns:
        A row per module and two of its parts, ``part_i`` ≤ ``part_j``: ``inner``, ``cosine`` (empty for a part of
        zero), ``parts``, how many there are, and ``span``: the effective rank of the matrix of cosines of those that
        are not zero. It is 1 where all parts are one but for their size, and their number where they are at right
        angles.

    Raises:
        AnalysisError: An adapter is no mixture, or cannot be read.

    Example:
        >>> ma.load_parts("hydra").drop_duplicates("name")[["name", "parts", "span"]]
    """
    import pandas as pd

    rows: list[tuple[Any, ...]] = []
    for adapter in discover(paths):
        rows += _of_adapter(adapter, Options(ignore_unknown=ignore_unknown))
    table = pd.DataFrame(rows, columns=list(_COLUMNS))
    return table.astype({"step": "Int64", "group": "Int64"})


def _of_adapter(adapter: Adapter, options: Options) -> Iterator[tuple[Any, ...]]:
    with opened(adapter, options) as (file, contents):
        if not find_format(adapter.config, file).routed:
            raise AnalysisError(
                f"{adapter.file}: it is no mixture of parts that a router weights; expected HydraLoRA's, say"
            )
        modules: dict[str, list[Matrix]] = {}
        for matrix in contents.matrices:
            name, _, index = matrix.name.rpartition(".")
            if index.isdigit():
                modules.setdefault(name, []).append(matrix)
        for name, parts in modules.items():
            gram = _gram(file, parts)
            norms = np.sqrt(np.diag(gram))
            with np.errstate(invalid="ignore", divide="ignore"):
                cosine = gram / norms[:, None] / norms
            known = norms > 0
            span = effective_rank(np.linalg.eigvalsh(cosine[np.ix_(known, known)]).clip(0)) if known.any() else np.nan
            head = (adapter.run, adapter.step, adapter.epoch, parts[0].group, parts[0].module, name)
            for i, j in zip(*np.triu_indices(len(parts)), strict=True):
                yield (*head, i, j, gram[i, j], cosine[i, j], len(parts), float(span))


def _gram(file: TensorFile, parts: Sequence[Matrix]) -> NDArray[np.float64]:
    """⟨ΔW_i, ΔW_j⟩ (parts, parts): the sum over (B_iᵀ B_j) ∘ (A_i A_jᵀ), times both scales."""
    sums = [part.update for part in parts if isinstance(part.update, Sum)]
    a, b, scaling = load_factors(file, sums)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise not_finite(file, sums[0], parts[0].name)
    n, rank, cols = a.shape
    inner = a.reshape(n * rank, cols)
    outer = b.transpose(0, 2, 1).reshape(n * rank, -1)
    products = (inner @ inner.T) * (outer @ outer.T)
    gram: NDArray[np.float64] = products.reshape(n, rank, n, rank).sum(axis=(1, 3)) * scaling[:, None] * scaling
    return gram
