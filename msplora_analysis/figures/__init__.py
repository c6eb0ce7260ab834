"""Figures from the tidy spectra table: one function each, which returns a matplotlib Figure; `write_figures` for all.

    from msplora_analysis import load_spectra
    from msplora_analysis.figures import figure3, write_figures

    spectra = load_spectra("runs")
    write_figures(spectra, Path("figures"))
    figure3(spectra, "MSPLoRA 8/8/8").savefig("figure3.pdf")

A *variant* is told from the table alone: the scales of a run and the number of values per scale. Any adapter with
the scale `layer` only is a 'LoRA r=8', one with more is an 'MSPLoRA 8/4/2'. Every figure averages over the runs
(tasks, seeds) of a variant.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from msplora_analysis.errors import AnalysisError

from . import (
    decoupling,
    effective_rank,
    kl_difference,
    kl_matrices,
    layer_kl,
    layer_spectra,
    m_eff,
    overlap_matrices,
    rank_needed,
    singular_values,
)
from .comparison import comparison_with_intervals
from .decoupling import decoupling_over_epochs
from .effective_rank import effective_rank_over_epochs
from .kl_difference import figure4
from .kl_matrices import kl_between_layers
from .layer_kl import kl_per_run, kl_summary
from .layer_spectra import spectra_by_layer
from .m_eff import m_eff_over_epochs
from .matrices import prepare
from .overlap_matrices import overlap_between_layers
from .pairs import prepare_pairs
from .plot import FORMATS, check_formats
from .rank_needed import rank_needed_map
from .singular_values import figure3

__all__ = [
    "FORMATS",
    "comparison_with_intervals",
    "decoupling_over_epochs",
    "effective_rank_over_epochs",
    "figure3",
    "figure4",
    "kl_between_layers",
    "kl_per_run",
    "kl_summary",
    "m_eff_over_epochs",
    "overlap_between_layers",
    "rank_needed_map",
    "spectra_by_layer",
    "write_figures",
]


def write_figures(
    spectra: pd.DataFrame,
    out_dir: Path,
    formats: Sequence[str] = ("pdf", "png"),
    *,
    epoch: float | None = None,
    pairs: pd.DataFrame | None = None,
    scales: pd.DataFrame | None = None,
) -> list[Path]:
    """Draw all that the table allows, with the numbers of each figure beside it as CSV. Returns the paths, in order.

    `epoch` is that of the figures of one checkpoint (Figure 4 and others); without it the last epoch that all runs
    share which a figure shows. `pairs` and `scales`, of `load_redundancy` for the same runs, are drawn too. Equal
    tables give equal bytes.
    """
    formats = check_formats(formats)
    matrices = prepare(spectra)
    plots = [
        *singular_values.plots(matrices),
        *kl_difference.plots(matrices, epoch),
        *kl_matrices.plots(matrices, epoch),
        *layer_kl.plots(matrices, epoch),
        *m_eff.plots(matrices),
        *effective_rank.plots(matrices),
        *layer_spectra.plots(matrices, epoch),
        *rank_needed.plots(matrices, epoch),
    ]
    labels = dict(zip(matrices["run"], matrices["variant"], strict=True))
    if pairs is not None and len(pairs):
        plots += overlap_matrices.plots(prepare_pairs(pairs[pairs["run"].isin(labels)], labels), epoch)
    if scales is not None and len(scales):
        plots += decoupling.plots(prepare_pairs(scales[scales["run"].isin(labels)], labels))
    if not plots:
        raise AnalysisError(
            "nothing to draw: figures need checkpoints of two or more epochs, or adapters of numbered layers"
        )
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    return [path for plot in plots for path in plot.write(out_dir, formats)]
