"""An adapter as a plain LoRA of lower rank: of every module the best approximation, from its factors alone.

Without moments that is the best in Frobenius norm: with the singular value decomposition U S Vᵀ of a module's whole
update, the first k triples are its best approximation of rank k, and miss the sum of the other sigma² (Eckart & Young
1936). Cutting a trained LoRA in this way is what LoRA-Squeeze (2026) calls post-hoc compression. With moments it is the
best in the metric of the task. The update is never formed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from msplora_analysis.compute.choose import Choice, Cut
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Options
from msplora_analysis.write.directions import Kept, Ranking, chosen_by_kl, cut, predicted_kl, ranked
from msplora_analysis.write.source import Source, factors, find_adapter, open_source, warn_of
from msplora_analysis.write.write import (
    as_pair,
    check_dtype,
    finish,
    new_folder,
    widest_dtype,
    write_peft,
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
    kl: float | None = None,
    weights: str | None = None,
    moments: StrPath | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    semantics: str = "paper",
    ignore_unknown: bool = False,
) -> pd.DataFrame:
    """Write the best approximation of an adapter by a plain PEFT LoRA adapter of lower rank.

    One of ``energy``, ``rank``, ``budget`` and ``kl`` says how much is kept. A module of rank 0 is left out of the
    adapter. Where the adapter has moments, "best" is in the metric of the task (see docs/metrics.md, task_sigma), and
    energy and gain are of the task-weighted singular values; else in Frobenius norm.

    Args:
        adapter: An adapter's folder or file, as ``load_spectra`` takes it; one, not several.
        out: The folder to write.
        energy: Of every module, the least rank that keeps this share of the sum of sigma², in (0, 1].
        rank: Of every module this rank, or its own if that is lower.
        budget: Parameters of the factors in all, heads not counted; directions go by gain (sigma²) per parameter.
        kl: The fewest parameters whose predicted KL stays below so many nats an example; needs moments with scores.
        weights: "moments", or "none": the plain norm, whatever moments there are. None: moments where they are.
        moments: See ``load_spectra``.
        dtype: Of the factors; None: float64 for an adapter in float64, else float32.
        overwrite: Replace an adapter that is in ``out``.
        semantics: See ``load_spectra``.
        ignore_unknown: Leave out tensors that no format explains, with a warning.

    Returns:
        One row per module: name, module, layer, rows, cols, rank_before, rank, parameters_before, parameters (of this
        module's factors), norm (of its update), energy (share of sigma² that is kept), error (Frobenius norm of what
        is lost, relative to the update's); with moments also task_norm, task_energy and task_error, the same in the
        metric of the task, and ``attrs["predicted_kl"]``, in nats an example (None without scores).

    Raises:
        AnalysisError: The adapter has no low-rank form, nothing would be left of it, its moments do not fit or lack
            what is asked for, or ``out`` cannot be written.

    Example:
        >>> ma.compress("runs/cola/checkpoint-270", "small", kl=0.01).attrs["predicted_kl"]
    """
    options = Options(ignore_unknown, semantics, moments=moments)
    return compressed(adapter, out, Choice(energy, rank, budget, kl), weights, dtype, overwrite, options).table


class Compressed(NamedTuple):
    """The table of ``compress``, what was read, the type that was written; of a choice by KL, the cut that it is.

    ``regression``: whether the task of the moments is one.
    """

    table: pd.DataFrame
    source: Source
    dtype: str
    by_task: bool
    by_kl: Cut | None
    regression: bool


def compressed(
    adapter: StrPath,
    out: StrPath,
    choice: Choice,
    weights: str | None,
    dtype: str | None,
    overwrite: bool,
    options: Options,
) -> Compressed:
    """``compress``, with what it read and how it chose."""
    check_dtype(dtype)
    choice.check()
    found = find_adapter(adapter)
    with new_folder(out, found.file, overwrite) as folder, open_source(found, options) as source:
        ranking = ranked(source, weights, options)
        by_kl = chosen_by_kl(ranking, choice.kl, source) if choice.kl is not None else None
        costs, full = ([getattr(one, name) for one in ranking.modules] for name in ("cost", "rank"))
        ranks = by_kl.ranks if by_kl else choice.ranks(ranking.counted(), full, costs)
        if not any(ranks):
            larger = "kl" if choice.kl is not None else "budget"
            why = "every update is zero"
            if any(one.sigma.any() for one in ranking.modules):
                why = "give a smaller kl=" if by_kl else "give a larger budget="
            raise AnalysisError(f"{found.file}: nothing would be left of it: {why}", larger)
        chosen = dtype or ("float64" if widest_dtype(source) == "float64" else "float32")
        pairs, kept = [], []
        for one, k in zip(ranking.modules, ranks, strict=True):
            kept.append(cut(one, *factors(source, one.module), k, by_task=ranking.by_task))
            if len(kept[-1].a):
                pairs.append(as_pair(one.module, kept[-1].a, kept[-1].b, chosen))
            kept[-1] = kept[-1]._replace(a=kept[-1].a[:, :0], b=kept[-1].b[:0])  # the factors are in the pair
        table = _table(ranking, kept)
        if any(one.weights is not None for one in ranking.modules):
            table.attrs["predicted_kl"] = by_kl.predicted if by_kl else predicted_kl(ranking, ranks)
        write_peft(folder, pairs, chosen, source)
        finish(folder, table)
    warn_of(source)
    return Compressed(table, source, chosen, ranking.by_task, by_kl, ranking.regression)


def _table(ranking: Ranking, kept: list[Kept]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for one, cut_ in zip(ranking.modules, kept, strict=True):
        module, update, rank = one.module, one.module.update, len(cut_.a)
        norm, task_norm = float(np.linalg.norm(one.sigma)), float(np.linalg.norm(one.task_sigma))
        of_module = (module.name, module.matrix.module, module.matrix.group, update.rows, update.cols)
        sizes = (update.rank, rank, update.rank * one.cost, rank * one.cost, norm)
        plain, task = (
            (1 - error**2 if of else np.nan, error) for error, of in ((cut_.error, norm), (cut_.task_error, task_norm))
        )
        rows.append((*of_module, *sizes, *plain, task_norm, *task))
    columns = ["name", "module", "layer", "rows", "cols", "rank_before", "rank", "parameters_before", "parameters"]
    columns += ["norm", "energy", "error", "task_norm", "task_energy", "task_error"]
    table = pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})
    measured = [one.weights is not None for one in ranking.modules]
    if not any(measured):
        return table.drop(columns=columns[-3:])
    table.loc[[not one for one in measured], columns[-3:]] = np.nan
    return table
