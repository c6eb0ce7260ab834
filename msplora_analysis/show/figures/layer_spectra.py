"""The singular values of every layer's own part at one checkpoint."""

from collections.abc import Iterator

import pandas as pd

from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, each_method, of_one_method, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.checkpoints import at_epoch
from msplora_analysis.tables.matrices import ks, prepare, weighted

TOP = 8


def spectra_by_layer(
    spectra: pd.DataFrame,
    method: str | None = None,
    *,
    stack: str | None = None,
    epoch: float | None = None,
    weights: str = "none",
    style: str | None = None,
) -> Figure:
    """Layers across, index k down (1 at the top), colour = sigma_k of the `layer` part, mean over modules and runs.

    With `weights="moments"` sigma is the task-weighted one, `task_sigma`.
    """
    return of_one_method(prepare(weighted(spectra, weights)), method, stack, epoch, numbers, draw, style, weights)


@plots_of(spectra_by_layer, order=6)
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
def draw(numbers: pd.DataFrame, style: Style, *, name_stack: bool = False) -> Figure:
    values = numbers.pivot(index="k", columns="layer", values="sigma")
    rows, layers = values.shape
    figure = Figure(figsize=(heatmap.width_for(style, layers), 1.0 + 0.15 * rows), layout="constrained")
    ax = figure.subplots()
    norm = heatmap.colour_scale(numbers["sigma"].max())
    cells = heatmap.draw_cells(ax, values.to_numpy(), norm, colours.SEQUENTIAL, first_row=1)
    ax.set(xlabel=LABELS["layer"], ylabel=LABELS["k"], yticks=values.index)
    figure.colorbar(cells, ax=ax, label=LABELS["sigma"], aspect=18, pad=0.02)
    first = numbers.iloc[0]
    text.title_of_layers(figure, f"{first['variant']}, layer parts", numbers, [first["runs"]], name_stack=name_stack)
    heatmap.label_layers(figure, [ax.xaxis], [int(layer) for layer in values.columns])
    return figure
