"""Figures from the tidy spectra table: one function each, which returns a matplotlib Figure.

    from msplora_analysis import load_spectra
    from msplora_analysis.show.figures import figure3, write_figures

    spectra = load_spectra("runs")
    write_figures(spectra, Path("figures"), style="icml")
    figure3(spectra, "MSPLoRA 8/8/8").savefig("figure3.pdf")

The figures are plain ones, not pyplot's: nothing else keeps them, and a notebook shows them once. `style` is that of
`venues.style_of`: the widths and letters of a venue.

`draw_figures` returns all, `write_figures` saves them. A *variant* is told from the table alone: the scales of a run
and the number of values per scale. Any adapter with the scale `layer` only is a 'LoRA r=8', one with more is an
'MSPLoRA 8/4/2'. Every figure averages over the runs (tasks, seeds) of a variant.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing.plot import FORMATS, Plot, check_formats
from msplora_analysis.show.drawing.venues import style_of
from msplora_analysis.show.figures import (
    decoupling,
    effective_rank,
    kl_difference,
    kl_matrices,
    kl_tables,
    layer_spectra,
    m_eff,
    overlap_matrices,
    rank_needed,
    singular_values,
)
from msplora_analysis.show.figures.comparison import comparison_with_intervals
from msplora_analysis.show.figures.decoupling import decoupling_over_epochs
from msplora_analysis.show.figures.effective_rank import effective_rank_over_epochs
from msplora_analysis.show.figures.kl_difference import figure4
from msplora_analysis.show.figures.kl_matrices import kl_between_layers
from msplora_analysis.show.figures.layer_spectra import spectra_by_layer
from msplora_analysis.show.figures.m_eff import m_eff_over_epochs
from msplora_analysis.show.figures.overlap_matrices import overlap_between_layers
from msplora_analysis.show.figures.rank_needed import rank_needed_map
from msplora_analysis.show.figures.singular_values import figure3
from msplora_analysis.show.notebook import Figures, show_figures
from msplora_analysis.tables.layer_kl import kl_per_run, kl_summary
from msplora_analysis.tables.matrices import prepare
from msplora_analysis.tables.prepared_pairs import prepare_pairs

show_figures()

__all__ = [
    "FORMATS",
    "comparison_with_intervals",
    "decoupling_over_epochs",
    "draw_figures",
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


def draw_figures(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]] | pd.DataFrame,
    style: str | None = None,
    which: str | Sequence[str] | None = None,
    *,
    epoch: float | None = None,
    pairs: pd.DataFrame | None = None,
    scales: pd.DataFrame | None = None,
    workers: int | None = 1,
) -> dict[str, Figure]:
    """Name → figure, to be shown, restyled and saved; the names are those of the files that `write_figures` writes.

    paths: adapters, or the folder or file of a spectra table, as `msplora-analyze figures` takes them; or the table
    itself, then with `pairs` and `scales` as for `write_figures`. style: see `venues.style_of`. which: only these, by
    name ("m_eff_over_epochs") or kind ("figure3"). Raises AnalysisError also if there is none of that name.
    """
    style_of(style)
    wanted = [which] if isinstance(which, str) else which
    if isinstance(paths, pd.DataFrame):
        spectra = paths
    else:
        from msplora_analysis.tables.gather import gather_redundancy
        from msplora_analysis.tables.load import gather_spectra

        listed = [paths] if isinstance(paths, str | PathLike) else list(paths)
        spectra = gather_spectra(listed, workers=workers)
        if wanted is None or any(name.startswith(_OF_PAIRS) for name in wanted):
            pairs, scales = gather_redundancy(listed, workers=workers)
    plots = [plot for plot in _plots(spectra, epoch, pairs, scales) if plot.draw]
    for name in wanted or ():
        if not any(_is(plot, name) for plot in plots):
            there = ", ".join(plot.stem for plot in plots)
            raise AnalysisError(f"no figure {name!r} can be drawn of this: choose from {there or 'none'}")
    chosen = [plot for plot in plots if wanted is None or any(_is(plot, name) for name in wanted)]
    return Figures({plot.stem: plot.draw(plot.numbers, style) for plot in chosen if plot.draw})


def write_figures(
    spectra: pd.DataFrame,
    out_dir: Path,
    formats: Sequence[str] = ("pdf", "png"),
    *,
    epoch: float | None = None,
    pairs: pd.DataFrame | None = None,
    scales: pd.DataFrame | None = None,
    style: str | None = None,
) -> list[Path]:
    """Draw all that the table allows, with the numbers of each figure beside it as CSV. Returns the paths, in order.

    `epoch` is that of the figures of one checkpoint (Figure 4 and others); without it the last epoch that all runs
    share which a figure shows. `pairs` and `scales`, of `load_redundancy` for the same runs, are drawn too. `style`:
    see `venues.style_of`. Equal tables give equal bytes.
    """
    formats = check_formats(formats)
    style_of(style)
    plots = _plots(spectra, epoch, pairs, scales)
    if not plots:
        raise AnalysisError(
            "nothing to draw: figures need checkpoints of two or more epochs, or adapters of numbered layers"
        )
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    return [path for plot in plots for path in plot.write(out_dir, formats, style)]


_OF_PAIRS = ("overlap_between_layers", "decoupling_over_epochs")


def _plots(
    spectra: pd.DataFrame, epoch: float | None, pairs: pd.DataFrame | None, scales: pd.DataFrame | None
) -> list[Plot]:
    """All that the tables allow, in order."""
    matrices = prepare(spectra)
    plots = [
        *singular_values.plots(matrices),
        *kl_difference.plots(matrices, epoch),
        *kl_matrices.plots(matrices, epoch),
        *kl_tables.plots(matrices, epoch),
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
    return plots


def _is(plot: Plot, name: str) -> bool:
    return plot.stem == name or plot.stem.startswith(f"{name}_")
