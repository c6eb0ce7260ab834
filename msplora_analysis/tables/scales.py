"""Rows of a table that may be averaged together: the parts of an adapter, or the whole update of each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msplora_analysis.errors import AnalysisError

if TYPE_CHECKING:
    import pandas as pd


def parts(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of what was trained, without the totals: what ``groupby("scale")`` and parameters are of.

    The table of an MSPLoRA run has its scales (global, mid, layer) and, for each layer, their sum (total). A mean over
    all rows would count every part twice.

    Args:
        table: Of ``load_spectra``, ``load_metrics`` or ``load_pairs``.

    Returns:
        The rows whose scale is not "total".

    Raises:
        AnalysisError: The table has no column `scale`.

    Example:
        >>> metrics = ma.parts(ma.load_metrics("runs/msplora"))
        >>> metrics.groupby(["run", "scale"])["effective_rank"].mean()
    """
    return table[_scale(table) != "total"]


def totals(table: pd.DataFrame) -> pd.DataFrame:
    """The whole update of each layer, one matrix each: what runs of different methods are compared by.

    Args:
        table: Of ``load_spectra`` or ``load_metrics``.

    Returns:
        The rows of scale "total"; of a run without any, such as LoRA, all rows: its one scale is the total.

    Raises:
        AnalysisError: The table has no column `scale`.

    Example:
        >>> metrics = ma.totals(ma.load_metrics(["runs/lora", "runs/msplora"]))
        >>> metrics.groupby("run")["effective_rank"].mean()
    """
    is_total = _scale(table) == "total"
    several = is_total.groupby(table["run"]).transform("any")
    return table[is_total | ~several]


def _scale(table: pd.DataFrame) -> pd.Series:
    if "scale" not in table or "run" not in table:
        raise AnalysisError("the table has no column scale: pass what load_spectra, load_metrics or load_pairs returns")
    return table["scale"]
