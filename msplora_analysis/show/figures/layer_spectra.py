"""The singular values of every layer's own part at one checkpoint."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh

from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, drawn, each_method, one_method, plots_of, weights_note
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.checkpoints import at_epoch
from msplora_analysis.tables.matrices import ks, prepare, stacks, weighted

TOP = 8


def plot_spectra_by_layer(
    spectra: pd.DataFrame,
    *,
    method: str | None = None,
    stack: str | None = None,
    epoch: float | None = None,
    colour: str = "log",
    weights: str = "none",
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """Layers across, index k down (1 at the top), colour = sigma_k of the `layer` part, mean over modules and runs.

    Args:
        spectra: Of `load_spectra`.
        method: Its label; None: the only one there is.
        stack: Of numbered layers; None: the only one there is.
        epoch: None: the last that all runs share.
        colour: "log" or "linear".
        weights: "moments": of the task-weighted spectra, `task_sigma`.
        ax: Where to draw; None: a figure of its own.
        style: The widths and letters of a venue.

    Returns:
        `ax`, or the figure.

    Raises:
        AnalysisError: The table has no such method, stack or epoch.

    Example:
        >>> ma.plot_spectra_by_layer(ma.load_spectra("examples/runs"), method="LoRA r=8")
    """
    if colour not in ("log", "linear"):
        raise AnalysisError(f"colour={colour!r}: expected log or linear")
    prepared = prepare(weighted(spectra, weights))
    layers, method, stack = one_method(prepared, method, stack)
    table = numbers(layers, method, stack, epoch)
    if ax is None:
        painted = partial(draw, name_stack=len(stacks(layers)) > 1, colour=colour)
        return drawn(painted, layers, table, style, weights_note(weights))
    heatmap.colour_bar(_panel(ax, table, colour), ax, LABELS["sigma"])
    return ax


@plots_of(plot_spectra_by_layer, order=6, name="spectra_by_layer")
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    return each_method("spectra_by_layer", matrices, numbers, draw, epoch)


def numbers(matrices: pd.DataFrame, method: str, stack: str, epoch: float | None = None) -> pd.DataFrame:
    """One row per layer and k ≤ min(rank of the layer, 8)."""
    parts = matrices[(matrices["scale"] == "layer") & (matrices["stack"] == stack) & (matrices["variant"] == method)]
    parts = at_epoch(parts, epoch)
    by = parts.groupby("group")
    means = by[ks(parts)[:TOP]].mean().melt(var_name="k", value_name="sigma", ignore_index=False).reset_index()
    table = means.merge(by["rank"].max().reset_index(), on="group").rename(columns={"group": "layer"})
    table = table[table["k"] <= table["rank"]].astype({"k": int}).sort_values(["layer", "k"], ignore_index=True)
    about = {"variant": method, "stack": stack, "epoch": parts["epoch"].iloc[0], "runs": parts["run"].nunique()}
    return pd.DataFrame(about, index=table.index).join(table)


@styled
def draw(numbers: pd.DataFrame, style: Style, *, name_stack: bool = False, colour: str = "log") -> Figure:
    layers = sorted(set(numbers["layer"].astype(int)))
    figure = Figure(
        figsize=(heatmap.width_for(style, len(layers)), 1.0 + 0.15 * int(numbers["k"].max())), layout="constrained"
    )
    ax = figure.subplots()
    heatmap.colour_bar(_panel(ax, numbers, colour), ax, LABELS["sigma"], aspect=18, pad=0.02)
    first = numbers.iloc[0]
    heading = f"{first['variant']}, layer parts, mean over modules"
    text.title_of_layers(figure, heading, numbers, [first["runs"]], name_stack=name_stack)
    heatmap.label_layers(figure, [ax.xaxis], layers)
    return figure


def _panel(ax: Axes, numbers: pd.DataFrame, colour: str) -> QuadMesh:
    values = numbers.pivot(index="k", columns="layer", values="sigma")
    shown = values.to_numpy(np.float64)
    norm = heatmap.log_scale(shown) if colour == "log" else heatmap.colour_scale(float(np.nanmax(shown, initial=0)))
    cells = heatmap.draw_cells(ax, shown, norm, colours.SEQUENTIAL, first_row=1)
    ax.set(xlabel=LABELS["layer"], ylabel=LABELS["k"], yticks=values.index)
    heatmap.tick_layers(ax.xaxis, [int(layer) for layer in values.columns])
    return cells
