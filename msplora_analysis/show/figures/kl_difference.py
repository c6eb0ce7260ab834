"""Figure 4: how far apart the layers' spectra lie under MSPLoRA, minus how far under LoRA."""

import warnings
from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh

from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, drawn, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables import layer_kl
from msplora_analysis.tables.matrices import choose, is_msplora, prepare, slug, stacks

_DOTTED = 4.0  # points; in smaller cells dots would cover the colours
_PALE = 0.25


def plot_figure4(
    spectra: pd.DataFrame,
    *,
    msplora: str | None = None,
    lora: str | None = None,
    stack: str | None = None,
    epoch: float | None = None,
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """D_KL(i‖j) between the `layer` parts under MSPLoRA minus that under LoRA: layer i down, layer j across.

    Spectra are averaged over modules and runs first, then compared; positive (red) means that the layers differ more
    under MSPLoRA. Dots mark cells whose 95 % interval over runs holds 0, where both methods have two runs or more.
    Source: MSPLoRA, arXiv 2503.21838, figure 4, eq. 9, 10.

    Args:
        spectra: Of `load_spectra`.
        msplora: The method of the one side; None: the only one there is.
        lora: That of the other.
        stack: Of numbered layers; None: the only one there is.
        epoch: None: the last that both methods share.
        ax: Where to draw; None: a figure of its own.
        style: The widths and letters of a venue.

    Returns:
        `ax`, or the figure.

    Raises:
        AnalysisError: The table has no such methods, stack or epoch.

    Example:
        >>> ma.plot_figure4(ma.load_spectra("examples/runs"), style="icml-column")
    """
    matrices = prepare(spectra)
    stack = choose("stack", stack, stacks(matrices))
    both = layer_kl.both_methods(matrices, stack)
    msplora = choose("MSPLoRA method", msplora, list(dict.fromkeys(ours for ours, _ in both)))
    lora = choose("LoRA method", lora, [theirs for ours, theirs in both if ours == msplora])
    table = numbers(matrices, msplora, lora, stack, epoch)
    ends = layer_kl.intervals(matrices, msplora, lora, stack, epoch)
    if ax is None:
        chosen = matrices[matrices["variant"].isin([msplora, lora])]
        painted = partial(draw, intervals=ends, name_stack=len(stacks(matrices)) > 1)
        return drawn(painted, chosen, table, style)
    heatmap.colour_bar(_panel(ax, table, ends), ax, LABELS["kl_difference"])
    layers = sorted(table["layer_i"].unique())
    heatmap.tick_layers(ax.xaxis, layers)
    heatmap.tick_layers(ax.yaxis, layers)
    ax.set(xlabel=LABELS["layer_j"], ylabel=LABELS["layer_i"], aspect="equal")
    return ax


@plots_of(plot_figure4, order=2, name="figure4")
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    several = len(stacks(matrices)) > 1
    for stack in stacks(matrices):
        both = layer_kl.both_methods(matrices, stack)
        kinds = {is_msplora(method) for method in layer_kl.layers_of(matrices, stack)}
        if len(kinds) == 2 and not both:
            warnings.warn(f"no Figure 4 of {stack}: MSPLoRA and LoRA runs adapt different layers", stacklevel=2)
        for msplora, lora in both:
            stem = f"figure4_{slug(msplora)}_minus_{slug(lora)}" + (f"_{slug(stack)}" if several else "")
            table = numbers(matrices, msplora, lora, stack, epoch)
            ends = layer_kl.intervals(matrices, msplora, lora, stack, epoch)
            of = f"{msplora} − {lora}" + (f", {stack}" if several else "")
            yield Plot(stem, table, partial(draw, intervals=ends, name_stack=several), of)
            yield Plot(f"{stem}_intervals", ends)


def numbers(matrices: pd.DataFrame, msplora: str, lora: str, stack: str, epoch: float | None = None) -> pd.DataFrame:
    """One row per ordered pair of layers: both divergences and `difference`."""
    table = layer_kl.numbers(matrices, [msplora, lora], stack, epoch)
    ours, theirs = (table[table["variant"] == method] for method in (msplora, lora))
    merged = ours.merge(theirs, on=["stack", "layer_i", "layer_j"], suffixes=("_msplora", "_lora"))
    merged["difference"] = merged["kl_msplora"] - merged["kl_lora"]
    sides = [f"{column}_{side}" for side in ("msplora", "lora") for column in ("variant", "epoch", "runs")]
    return merged[["stack", *sides, "layer_i", "layer_j", "kl_msplora", "kl_lora", "difference"]]


@styled
def draw(
    numbers: pd.DataFrame, style: Style, *, intervals: pd.DataFrame | None = None, name_stack: bool = False
) -> Figure:
    layers = sorted(numbers["layer_i"].unique())
    figure, axes = heatmap.square_panels(style, layers, 1)
    small = 72 * (figure.get_figwidth() - 1.3) / len(layers) < _DOTTED
    cells = _panel(axes[0], numbers, intervals, pale=small)
    heatmap.colour_bar(cells, axes, LABELS["kl_difference"], aspect=25, pad=0.02)
    first = numbers.iloc[0]
    ours, theirs = first["variant_msplora"], first["variant_lora"]
    key = f"red: layers differ more under {ours}, blue: under {theirs}"
    if intervals is not None and len(intervals):
        key += f"; {'pale' if small else 'dots'}: 95 % interval over runs holds 0"
    runs = [first["runs_msplora"], first["runs_lora"]]
    text.title_of_layers(figure, f"{ours} − {theirs}", numbers, runs, name_stack=name_stack, key=key)
    heatmap.finish_squares(figure, axes, layers)
    if len(axes[0].lines):
        pitch = axes[0].get_window_extent().width / len(layers) * 72 / figure.dpi
        axes[0].lines[0].set_markersize(min(2.5, 0.25 * pitch))
    return figure


def _panel(ax: Axes, numbers: pd.DataFrame, intervals: pd.DataFrame | None, *, pale: bool = False) -> QuadMesh:
    values = layer_kl.matrix(numbers, "difference")
    largest = np.nanmax(np.abs(values), initial=0) or 1
    cells = heatmap.draw_cells(ax, values, heatmap.colour_scale(largest, -largest), colours.DIVERGING)
    if intervals is not None and len(intervals):
        open_ = (intervals["low"] <= 0) & (intervals["high"] >= 0) & (intervals["layer_i"] != intervals["layer_j"])
        place = {layer: i for i, layer in enumerate(sorted(numbers["layer_i"].unique()))}
        down, across = (intervals.loc[open_, name].map(place).to_numpy(int) for name in ("layer_i", "layer_j"))
        if pale:
            alpha = np.ones(values.shape)
            alpha[down, across] = _PALE
            ax.set_facecolor("white")
            cells.set_alpha(alpha)  # type: ignore[arg-type]  # the stubs lack arrays
        else:
            ax.plot(across, down, ".", color="0.3", markersize=1.5)
    return cells
