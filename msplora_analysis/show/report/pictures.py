"""The figures that a reader of the report asks for first, as pictures inside the page."""

from __future__ import annotations

import warnings
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING

from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.tables.gather import gather_ablations

if TYPE_CHECKING:
    import pandas as pd

    from msplora_analysis.show.drawing.plot import Plot

_READ = {
    "figure3": "Singular values of each scale over training; in the second row their share of the first. "
    "Slow darkening downwards is a broad update.",
    "figure4": "Red: two layers' spectra differ more under MSPLoRA than under LoRA; blue: less.",
    "what_carries": "What is lost without each part: bright modules carry the task.",
    "metric_against_rank": "The rank at which the metric leaves the dotted line is what this adapter needs.",
    "effective_rank_map": "Which layers are broad, and when they became so.",
}
_MOST = 6


def pictures(evidence: Evidence, matrices: pd.DataFrame | None, paths: Sequence[StrPath]) -> list[dict[str, str]]:
    """Figures 3 and 4, what carries the task, the metric against rank, effective ranks: those that there are.

    Args:
        evidence: What was read.
        matrices: Of `prepare`, or None.
        paths: Where ablations may lie.
    """
    if evidence.matrices.keys["time"].nunique() < 2 and len(evidence.runs) < 2:
        return []  # one checkpoint: the page's own charts show it
    import msplora_analysis.show.figures  # noqa: F401  # declares the figures
    from msplora_analysis.show.drawing.plot import all_plots

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said where the page compares
        try:
            ablation, _ = gather_ablations(paths)
        except AnalysisError:
            ablation = None
        tables = {"spectra": matrices, "ablation": ablation}
        plots = all_plots({name: table for name, table in tables.items() if table is not None}, kinds=tuple(_READ))
    drawn = [plot for kind in _READ for plot in plots if plot.kind == kind and plot.draw]
    return [_picture(plot) for plot in drawn[:_MOST]]


def _picture(plot: Plot) -> dict[str, str]:
    png, size = plot.figure()._repr_png_()
    return {
        "name": printable(plot.name),
        "stem": plot.stem,
        "read": _READ[plot.kind],
        "width": str(size["width"]),
        "png": f"data:image/png;base64,{b64encode(png).decode()}",
        "csv": f"data:text/csv;base64,{b64encode(plot.csv).decode()}",
    }
