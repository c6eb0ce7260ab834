"""An adapter as a plain LoRA of lower rank: of every module the best approximation, from its factors alone.

With the singular value decomposition U S Vᵀ of a module's whole update, the first k triples are its
best approximation of rank k in Frobenius norm, and miss the sum of the other sigma² (Eckart & Young
1936). Cutting a trained LoRA in this way is what LoRA-Squeeze (2026) calls post-hoc compression.
The update is never formed: QR of both factors in float64, and the decomposition of an r×r core.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from msplora_analysis.compute.linalg.spectra import Array, adapter_spectra
from msplora_analysis.compute.measures.rank_needed import energy_rank
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Options
from msplora_analysis.write.source import Source, factors, find_adapter, open_source, warn_of
from msplora_analysis.write.write import (
    as_pair,
    check_dtype,
    new_folder,
    widest_dtype,
    write_adapter,
)

if TYPE_CHECKING:
    import pandas as pd


def compress(
    adapter: StrPath,
    out: StrPath,
    *,
    energy: float | None = None,
    rank: int | None = None,
    budget: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    semantics: str = "paper",
    ignore_unknown: bool = False,
) -> pd.DataFrame:
    """Write the best approximation of an adapter by a plain PEFT LoRA adapter of lower rank.

    One of ``energy``, ``rank`` and ``budget`` says how much is kept. A module of rank 0 is left out of the adapter.

    Args:
        adapter: An adapter's folder or file, as ``load_spectra`` takes it; one, not several.
        out: The folder to write.
        energy: Of every module, the least rank that keeps this share of the sum of sigma², in (0, 1].
        rank: Of every module this rank, or its own if that is lower.
        budget: Parameters of the factors in all, heads not counted; directions go by gain (sigma²) per parameter.
        dtype: Of the factors; None: float64 for an adapter in float64, else float32.
        overwrite: Replace an adapter that is in ``out``.
        semantics: See ``load_spectra``.
        ignore_unknown: Leave out tensors that no format explains, with a warning.

    Returns:
        One row per module: name, module, layer, rows, cols, rank_before, rank, parameters_before, parameters (of this
        module's factors), norm (of its update), energy (share of sigma² that is kept), error (Frobenius norm of what
        is lost, relative to the update's).

    Raises:
        AnalysisError: The adapter has no low-rank form, nothing would be left of it, or ``out`` cannot be written.
    """
    options = Options(ignore_unknown, semantics)
    return compressed(adapter, out, energy, rank, budget, dtype, overwrite, options)[0]


def compressed(
    adapter: StrPath,
    out: StrPath,
    energy: float | None,
    rank: int | None,
    budget: int | None,
    dtype: str | None,
    overwrite: bool,
    options: Options,
) -> tuple[pd.DataFrame, Source, str]:
    """``compress``, with what it read and the type that it wrote."""
    check_dtype(dtype)
    _check_choice(energy, rank, budget)
    found = find_adapter(adapter)
    with new_folder(out, found.file, overwrite) as folder, open_source(found, options) as source:
        spectra = [one.sigma for one in adapter_spectra(source.file, [module.matrix for module in source.modules])]
        ranks = _ranks(source, spectra, energy, rank, budget)
        if not any(ranks):
            why = "give a larger budget=" if any(sigma.any() for sigma in spectra) else "every update is zero"
            raise AnalysisError(f"{found.file}: nothing would be left of it: {why}", "budget")
        chosen = dtype or ("float64" if widest_dtype(source) == "float64" else "float32")
        pairs = [
            as_pair(module, *truncated(*factors(source, module), k), chosen)
            for module, k in zip(source.modules, ranks, strict=True)
            if k
        ]
        table = _table(source, spectra, ranks)
        write_adapter(folder, pairs, chosen, source, table)
    warn_of(source)
    return table, source, chosen


def truncated(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """Factors of the best approximation of ``b @ a``; the square root of each singular value goes into either.

    Args:
        a: (r, cols).
        b: (rows, r).
        rank: At most r.

    Returns:
        (rank, cols) and (rows, rank).
    """
    q_a, r_a = np.linalg.qr(a.T)
    q_b, r_b = np.linalg.qr(b)
    u, sigma, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    return root[:, None] * (vt[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root


def _check_choice(energy: float | None, rank: int | None, budget: int | None) -> None:
    if sum(choice is not None for choice in (energy, rank, budget)) != 1:
        raise AnalysisError("give one of energy=, rank= and budget=", "energy", "rank", "budget")
    if energy is not None and not 0 < energy <= 1:
        raise AnalysisError(
            f"energy={energy:g}: expected a share of the sum of sigma², above 0 and at most 1", "energy"
        )
    for name, value in (("rank", rank), ("budget", budget)):
        if value is not None and value < 1:
            raise AnalysisError(f"{name}={value}: expected a whole number of at least 1", name)


def _ranks(
    source: Source, spectra: list[Array], energy: float | None, rank: int | None, budget: int | None
) -> list[int]:
    """How many directions to keep of each module; zeros but for rounding are never kept."""
    sizes = [max(module.update.rows, module.update.cols) for module in source.modules]
    present = [_numerical_rank(sigma, size) for sigma, size in zip(spectra, sizes, strict=True)]
    if energy is not None:
        return [int(energy_rank(sigma[:k], energy)) if k else 0 for sigma, k in zip(spectra, present, strict=True)]
    if rank is not None:
        return [min(rank, k) for k in present]
    assert budget is not None
    costs = [module.update.rows + module.update.cols for module in source.modules]
    return allocate([sigma[:k] ** 2 for sigma, k in zip(spectra, present, strict=True)], costs, budget)


def allocate(gains: Sequence[Array], costs: Sequence[int], budget: int) -> list[int]:
    """How many directions to keep of each module: by descending gain per parameter, passing over what does not fit.

    Their sum of gains is within one gain, that of the first direction passed over, of the largest possible (Dantzig's
    bound of the knapsack), and is the largest where all costs are equal.

    Args:
        gains: Of each module, (r_i,), descending.
        costs: What each direction of a module costs.
        budget: What all may cost.
    """
    ranks = [0] * len(gains)
    directions = ((-gain / costs[i], i) for i, of_module in enumerate(gains) for gain in of_module)
    for _, module in sorted(directions):
        if costs[module] <= budget:
            budget -= costs[module]
            ranks[module] += 1
    return ranks


def _numerical_rank(sigma: Array, size: int) -> int:
    """How many singular values are more than rounding, as numpy's matrix_rank tells it."""
    return int((sigma > size * np.finfo(np.float64).eps * sigma[0]).sum())


def _table(source: Source, spectra: list[Array], ranks: list[int]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for module, sigma, rank in zip(source.modules, spectra, ranks, strict=True):
        update, size = module.update, module.update.rows + module.update.cols
        norm, lost = float(np.linalg.norm(sigma)), float(np.linalg.norm(sigma[rank:]))
        error = lost / norm if norm else 0.0
        of_module = (module.name, module.matrix.module, module.matrix.group, update.rows, update.cols)
        kept = (update.rank, rank, update.rank * size, rank * size, norm, 1 - error**2 if norm else np.nan, error)
        rows.append((*of_module, *kept))
    columns = ["name", "module", "layer", "rows", "cols", "rank_before", "rank", "parameters_before", "parameters"]
    return pd.DataFrame(rows, columns=[*columns, "norm", "energy", "error"]).astype({"layer": "Int64"})
