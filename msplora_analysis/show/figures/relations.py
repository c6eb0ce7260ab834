"""How adapters relate: of many a tree and a matrix, of two each module."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from msplora_analysis.ask.relations import linkage, matrix
from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.names import stack_and_layer
from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.show.drawing.style import SMALLEST, styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.relations import ALL

_LETTERS = 28  # of an adapter's or a module's name


def plot_relations(relations: pd.DataFrame, *, style: str | None = None) -> Figure:
    """How adapters relate: of three or more the cosine of every two, beside a tree of the like; of two, of each module.

    `relations` is the table of `relate`. The tree joins by average linkage of 1 - cosine.

    Example:
        >>> ma.plot_relations(ma.relate("style", "subject"))
    """
    for plot in plots(relations):
        if plot.draw:
            return plot.draw(plot.numbers, style)
    raise AnalysisError("the table holds no relations: pass what relate returns")


@plots_of(plot_relations, order=13, needs="relations", name="relations")
def plots(relations: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    whole = relations[relations["module"] == ALL]
    if len(whole) == 1:
        yield Plot("relations", relations[relations["module"] != ALL], draw_modules)
    elif len(whole) > 1:
        yield Plot("relations", whole, draw_matrix)


@styled
def draw_matrix(numbers: pd.DataFrame, style: Style) -> Figure:
    from scipy.cluster.hierarchy import dendrogram  # slow to import

    labels, tree = linkage(numbers)
    _, cosine = matrix(numbers)
    order = dendrogram(tree, no_plot=True)["leaves"]
    cosine = cosine[np.ix_(order, order)]
    n = len(labels)
    names = [label if len(label) <= _LETTERS else f"…{label[1 - _LETTERS :]}" for label in (labels[i] for i in order)]
    side = max(1.6, 0.14 * n)
    letters = 0.06 * max(map(len, names))
    needed = side + letters + 1.7
    width = next((width for width in style.widths if width >= needed), max(needed, style.widest))
    figure = Figure(figsize=(width, side + letters + 0.5), layout="constrained")
    left, ax = figure.subplots(1, 2, width_ratios=[0.6, side])
    lines = dendrogram(tree, no_plot=True)
    for places, heights in zip(lines["icoord"], lines["dcoord"], strict=True):
        left.plot(heights, [(place - 5) / 10 for place in places], color="0.35", linewidth=0.8)
    left.set(xlim=(max(1.0, 1.02 * float(tree[:, 2].max())), 0), ylim=(n - 0.5, -0.5), xlabel="1 − cosine")
    left.set_yticks([])
    left.spines[["top", "right", "left"]].set_visible(False)
    off = np.where(np.eye(n, dtype=bool), np.nan, cosine)
    most = float(np.nanmax(np.abs(off), initial=0))
    norm = heatmap.colour_scale(most, -most if most else -1)
    cells = heatmap.draw_cells(ax, off, norm, colours.DIVERGING)
    ax.set_xticks(range(n), names, rotation=90, fontsize=SMALLEST, parse_math=False)
    ax.set_yticks(range(n), names, fontsize=SMALLEST, parse_math=False)
    ax.yaxis.tick_right()
    figure.colorbar(cells, ax=ax, label="cosine of the updates", shrink=0.8, pad=0.02)
    text.title(figure, "How adapters relate", f"{n} adapters")
    return figure


@styled
def draw_modules(numbers: pd.DataFrame, style: Style) -> Figure:
    """Two adapters: the cosine, and on either side the overlap over that of chance, of each module of each layer."""
    places = [stack_and_layer(name) for name in numbers["name"]]
    table = numbers.assign(
        layer=[0 if layer is None else layer for _, layer in places],
        inputs=numbers["overlap_in"] / numbers["expected_in"],
        outputs=numbers["overlap_out"] / numbers["expected_out"],
    )
    layers = sorted(set(table["layer"]))
    panels = {"cosine": "cosine", "inputs": "input overlap / chance", "outputs": "output overlap / chance"}
    modules = list(dict.fromkeys(table["module"]))
    width = max(heatmap.width_for(style, len(layers), beside=0.05 * max(map(len, modules))), style.widest)
    height = 0.75 + 0.16 * len(modules)
    figure = Figure(figsize=(width, 0.5 + height * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, (column, label) in zip(axes, panels.items(), strict=True):
        values = table.pivot_table(index="module", columns="layer", values=column, sort=False, dropna=False)
        cells = values.reindex(index=modules, columns=layers).to_numpy(np.float64)
        most = float(np.nanmax(np.abs(cells), initial=0))
        signed = column == "cosine"
        norm = heatmap.colour_scale(most, -most if signed else 0)
        drawn = heatmap.draw_cells(ax, cells, norm, colours.DIVERGING if signed else colours.OVERLAPS)
        ax.set_yticks(range(len(modules)), [text.broken(module, _LETTERS) for module in modules], parse_math=False)
        ax.set_title(label)
        figure.colorbar(drawn, ax=ax, aspect=6, pad=0.02)
    axes[-1].set_xlabel("layer")
    first = numbers.iloc[0]
    text.title(figure, f"{first['a']} and {first['b']}")
    text.fit(figure)
    heatmap.label_layers(figure, [ax.xaxis for ax in axes], layers)
    return figure
