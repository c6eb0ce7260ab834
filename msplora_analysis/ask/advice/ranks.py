"""What each rank would keep of an adapter: parameters, energy, and where measured, the task's energy, KL and metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from msplora_analysis.ask.advice.cuts import beyond, predicted

if TYPE_CHECKING:
    from msplora_core.moments import Moments

MEASURED = ("kl", "metric", "metric_change", "low", "high")
COLUMNS = {
    "rank": "int64", "parameters": "int64", "megabytes": "float64", "energy": "float64", "task_energy": "float64",
    "predicted_kl": "float64", "kl": "float64", "metric": "float64", "metric_change": "float64", "low": "float64",
    "high": "float64",
}  # fmt: skip


def rank_table(
    spectra: pd.DataFrame, metrics: pd.DataFrame, moments: Moments | None, ablation: pd.DataFrame | None
) -> pd.DataFrame:
    """One row per rank to which every module would be cut.

    Args:
        spectra: Of one adapter's whole updates: one row per singular value.
        metrics: Likewise, one row per module.
        moments: Those of the adapter, or None.
        ablation: Its table, or None.

    Returns:
        Columns rank, parameters (of plain LoRA factors), megabytes (float32), energy (share of Σσ² over all modules),
        task_energy (of the task-weighted σ²), predicted_kl (nats an example, from the gates), and of the ablation kl,
        metric, metric_change, low, high; empty where not known.
    """
    full = int(metrics["rank"].max())
    by_k = spectra.assign(energy=spectra["sigma"] ** 2).groupby("k")["energy"].sum()
    has_task = "task_sigma" in spectra and spectra["task_sigma"].notna().any()
    by_task = spectra.assign(energy=spectra["task_sigma"] ** 2).groupby("k")["energy"].sum() if has_task else None
    sizes, ranks = (metrics["rows"] + metrics["cols"]).to_numpy(), metrics["rank"].to_numpy()
    measured = cuts_to_rank(ablation, "rank_task" if moments is not None else "rank")
    rows = []
    for rank in ranks_shown(full, list(measured.index)):
        parameters = int((sizes * np.minimum(ranks, rank)).sum())
        row: dict[str, float] = {
            "rank": rank,
            "parameters": parameters,
            "megabytes": parameters * 4 / 1e6,
            "energy": share(by_k, rank),
        }
        if by_task is not None:
            row["task_energy"] = share(by_task, rank)
        if moments is not None and (scores := beyond(moments, rank)) is not None:
            row["predicted_kl"] = predicted(moments, scores)
        if rank in measured.index:
            row |= dict(
                zip(MEASURED, measured.loc[[rank], list(MEASURED)].to_numpy(np.float64)[0].tolist(), strict=True)
            )
        elif rank == full and ablation is not None and (ablation["cut"] == "none").any():
            row |= {"kl": 0.0, "metric": float(ablation.loc[ablation["cut"] == "none", "metric"].iloc[0])}
            row |= {"metric_change": 0.0}
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def ranks_shown(full: int, measured: list[int]) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... and what was measured, the adapter's own rank last."""
    steps = [rank for i in range(full.bit_length()) for rank in (1 << i, 3 << i)]
    return sorted({rank for rank in (*steps, *measured) if 0 < rank < full} | {full})


def share(energy: pd.Series, rank: int) -> float:
    """Of the sum, what the first ``rank`` hold; NaN of nothing."""
    total = float(energy.sum())
    return float(energy[energy.index <= rank].sum()) / total if total > 0 else float("nan")


def cuts_to_rank(ablation: pd.DataFrame | None, cut: str) -> pd.DataFrame:
    """The rows of an ablation that cut every module to a rank, by that rank."""
    if ablation is None:
        return pd.DataFrame(columns=list(MEASURED))
    rows = ablation[(ablation["cut"] == cut) & ablation["rank"].notna()]
    return rows.assign(rank=rows["rank"].astype(int)).drop_duplicates("rank").set_index("rank")
