"""Where updates are broad: the effective rank of every layer and module, and of every layer over the epochs."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from msplora_analysis.compute.measures.metrics import effective_rank
from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, drawn, each_method, one_method, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.matrices import prepare, sigma, stacks

_BY = ("module", "epoch")


def plot_effective_rank_map(
    spectra: pd.DataFrame,
    *,
    method: str | None = None,
    stack: str | None = None,
    by: str = "module",
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """The effective rank of each layer: by module at the last epoch, and over the epochs, where there are several.

    Computed per matrix of the `layer` scale, then averaged: over runs, and for the epochs over modules. High is broad.

    Args:
        spectra: Of `load_spectra`.
        method: Its label; None: the only one there is.
        stack: Of numbered layers; None: the only one there is.
        by: With `ax`, "module" or "epoch".
        ax: Where to draw one map; None: a figure of both.
        style: The widths and letters of a venue.

    Returns:
        `ax`, or the figure.

    Raises:
        AnalysisError: The table has no such method or stack.

    Example:
        >>> ma.plot_effective_rank_map(ma.load_spectra("examples/runs"), method="LoRA r=8")
    """
    layers, method, stack = one_method(prepare(spectra), method, stack)
    table = numbers(layers, method, stack)
    if ax is None:
        return drawn(partial(draw, name_stack=len(stacks(layers)) > 1), layers, table, style)
    if by not in _BY:
        raise AnalysisError(f"by={by!r}: expected {' or '.join(_BY)}")
    norm = heatmap.colour_scale(float(table["effective_rank"].max()), lowest=1)
    if by == "module":
        cells, values = heatmap.draw_modules(ax, _last(table), "effective_rank", norm)
    else:
        values = _over_epochs(table).to_numpy(np.float64)
        cells = heatmap.draw_cells(ax, values, norm, colours.SEQUENTIAL)
        _label_epochs(ax, list(_over_epochs(table).index))
        heatmap.tick_layers(ax.xaxis, [int(layer) for layer in _over_epochs(table).columns])
    heatmap.colour_bar(cells, ax, LABELS["effective_rank"])
    heatmap.write_numbers(cells, values)
    ax.set_xlabel(LABELS["layer"])
    return ax


@plots_of(plot_effective_rank_map, order=5, name="effective_rank_map")
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    return each_method("effective_rank_map", matrices, numbers, draw, None)


def numbers(matrices: pd.DataFrame, method: str, stack: str, epoch: float | None = None) -> pd.DataFrame:
    """One row per epoch, module and layer: the mean over runs; epochs before anything was learned are left out."""
    parts = matrices[(matrices["variant"] == method) & (matrices["scale"] == "layer") & (matrices["stack"] == stack)]
    parts = parts.assign(effective_rank=effective_rank(sigma(parts)))
    by = parts.groupby(["epoch", "module", "group"], dropna=False)
    table = by.agg(rank=("rank", "max"), effective_rank=("effective_rank", "mean"), runs=("run", "nunique"))
    table = table[table["effective_rank"].notna()].reset_index().rename(columns={"group": "layer"})
    table = table.assign(variant=method, stack=stack)
    return table[["variant", "stack", "epoch", "runs", "module", "layer", "rank", "effective_rank"]]


@styled
def draw(numbers: pd.DataFrame, style: Style, *, name_stack: bool = False) -> Figure:
    last, timed = _last(numbers), _over_epochs(numbers)
    epochs = list(timed.index)
    more = [min(0.17 * len(epochs), 2.0)] if len(epochs) > 1 else []
    figure, axes, layers = heatmap.module_panels(style, last, 1, more)
    norm = heatmap.colour_scale(float(numbers["effective_rank"].max()), lowest=1)
    drawn = [heatmap.draw_modules(axes[0], last, "effective_rank", norm)]
    if more:
        axes[0].set_title("modules, last epoch")
        axes[1].set_title("over the epochs, mean over modules")
        values = timed.to_numpy(np.float64)
        drawn.append((heatmap.draw_cells(axes[1], values, norm, colours.SEQUENTIAL), values))
        _label_epochs(axes[1], epochs)
    axes[-1].set_xlabel(LABELS["layer"])
    heatmap.colour_bar(drawn[0][0], axes, f"{LABELS['effective_rank']}, of {last['rank'].max()}", aspect=25, pad=0.02)
    first = numbers.iloc[0]
    heading = f"{first['variant']}, layer parts: effective rank"
    text.title_of_layers(figure, heading, last, [int(numbers["runs"].max())], name_stack=name_stack)
    heatmap.label_layers(figure, [ax.xaxis for ax in axes], layers)
    for cells, values in drawn:
        heatmap.write_numbers(cells, values)
    return figure


def _last(numbers: pd.DataFrame) -> pd.DataFrame:
    return numbers[numbers["epoch"].isna() | (numbers["epoch"] == numbers["epoch"].max())]


def _over_epochs(numbers: pd.DataFrame) -> pd.DataFrame:
    return numbers.pivot_table(index="epoch", columns="layer", values="effective_rank")


def _label_epochs(ax: Axes, epochs: list[float]) -> None:
    step = -(-len(epochs) // 12)
    ax.set_yticks(range(0, len(epochs), step), [f"{epoch:g}" for epoch in epochs[::step]])
    ax.set_ylabel(LABELS["epoch"])
