"""Rank-needed map: how many directions hold most of each layer's update, module by module."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from msplora_analysis.compute.measures.metrics import Array
from msplora_analysis.compute.measures.rank_needed import energy_rank
from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing import heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, drawn, each_method, one_method, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.checkpoints import at_epoch
from msplora_analysis.tables.matrices import prepare, sigma, stacks

SHARES = (0.9, 0.99)


def plot_rank_needed(
    spectra: pd.DataFrame,
    *,
    method: str | None = None,
    stack: str | None = None,
    epoch: float | None = None,
    energy: float = 0.9,
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """The number of directions that hold 90 % and 99 % of the energy (sum of sigma²): modules down, layers across.

    Computed per matrix of the `layer` scale, then averaged over runs. It describes the rank that an update used; that
    a task needs no more is not shown by it.

    Args:
        spectra: Of `load_spectra`.
        method: Its label; None: the only one there is.
        stack: Of numbered layers; None: the only one there is.
        epoch: None: the last that all runs share.
        energy: With `ax`, 0.9 or 0.99.
        ax: Where to draw one map; None: a figure of both.
        style: The widths and letters of a venue.

    Returns:
        `ax`, or the figure.

    Raises:
        AnalysisError: The table has no such method, stack or epoch.

    Example:
        >>> ma.plot_rank_needed(ma.load_spectra("examples/runs"), method="LoRA r=8")
    """
    layers, method, stack = one_method(prepare(spectra), method, stack)
    table = numbers(layers, method, stack, epoch)
    if ax is None:
        return drawn(partial(draw, name_stack=len(stacks(layers)) > 1), layers, table, style)
    if energy not in SHARES:
        raise AnalysisError(f"energy={energy}: expected {' or '.join(map(str, SHARES))}")
    of_share = table[table["energy"] == energy]
    norm = heatmap.colour_scale(max(int(of_share["rank"].max()), 2), lowest=1)
    cells, values = heatmap.draw_modules(ax, of_share, "rank_needed", norm)
    heatmap.colour_bar(cells, ax, LABELS["rank_needed"], ticks=MaxNLocator(integer=True))
    heatmap.write_numbers(cells, values, _form(values))
    ax.set(xlabel=LABELS["layer"], title=f"{energy:.0%} of the energy")
    return ax


@plots_of(plot_rank_needed, order=7, name="rank_needed")
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    plots = each_method("rank_needed", matrices, numbers, draw, epoch)
    return (plot for plot in plots if plot.numbers["rank_needed"].notna().any())


def numbers(matrices: pd.DataFrame, method: str, stack: str, epoch: float | None = None) -> pd.DataFrame:
    """One row per share of the energy, module and layer: `rank_needed` (mean over runs), its share of the `rank`."""
    chosen = matrices[(matrices["variant"] == method) & (matrices["scale"] == "layer") & (matrices["stack"] == stack)]
    parts = at_epoch(chosen, epoch)
    by = ["module", "group"]
    tables = []
    for share in SHARES:
        means = parts.assign(rank_needed=energy_rank(sigma(parts), share)).groupby(by, sort=False)
        table = means.agg(rank_needed=("rank_needed", "mean"), rank=("rank", "max"), runs=("run", "nunique"))
        tables.append(table.reset_index().rename(columns={"group": "layer"}).assign(energy=share))
    table = pd.concat(tables, ignore_index=True).assign(variant=method, stack=stack)
    known = parts["epoch"].unique()
    table["epoch"] = known[0] if len(known) == 1 else np.nan
    columns = ["variant", "stack", "epoch", "runs", "energy", "module", "layer", "rank", "rank_needed"]
    return table[columns].sort_values(["energy", "module", "layer"], ignore_index=True)


@styled
def draw(numbers: pd.DataFrame, style: Style, *, name_stack: bool = False) -> Figure:
    shares = sorted(numbers["energy"].unique())
    rank = int(numbers["rank"].max())
    form = _form(numbers["rank_needed"].to_numpy(np.float64))
    figure, axes, layers = heatmap.module_panels(style, numbers, len(shares))
    norm = heatmap.colour_scale(max(rank, 2), lowest=1)
    drawn = []
    for ax, share in zip(axes, shares, strict=True):
        drawn.append(heatmap.draw_modules(ax, numbers[numbers["energy"] == share], "rank_needed", norm))
        ax.set_title(f"{share:.0%} of the energy")
    axes[-1].set_xlabel(LABELS["layer"])
    label = f"{LABELS['rank_needed']}, of {rank}"
    heatmap.colour_bar(drawn[0][0], axes, label, aspect=25, pad=0.02, ticks=MaxNLocator(integer=True))
    first = numbers.iloc[0]
    heading = f"{first['variant']}, layer parts: rank used"
    text.title_of_layers(figure, heading, numbers, [int(numbers["runs"].max())], name_stack=name_stack)
    heatmap.label_layers(figure, [ax.xaxis for ax in axes], layers)
    for cells, values in drawn:
        heatmap.write_numbers(cells, values, form)
    return figure


def _form(values: Array) -> str:
    """Whole numbers as they are, means with one digit."""
    known = values[np.isfinite(values)]
    return "{:.0f}" if (known == known.round()).all() else "{:.1f}"
