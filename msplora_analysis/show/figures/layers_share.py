"""What layers could share: the energy that scales common to several layers keep of each layer, beside chance."""

from collections.abc import Iterator

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing import text
from msplora_analysis.show.drawing.colours import PALETTE
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.heatmap import label_layers
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.matrices import choose, slug

_CHANCE = (0, (1, 2))


def plot_layers_share(
    sharing: pd.DataFrame,
    *,
    module: str | None = None,
    stack: str | None = None,
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """The share of each layer's energy that the scales keep, dotted what they keep of layers in random directions.

    The table is that of `share`; `stack` (of numbered layers) chooses where it has several. With `ax`, the layers of
    one type of `module` are drawn there, and `ax` returned.

    Example:
        >>> ma.plot_layers_share(ma.share("runs/lora/checkpoint-270", "nearest"))
    """
    if "scales" not in sharing or "chance" not in sharing:
        raise AnalysisError("the table has no fits of scales: pass what msplora-analyze share wrote")
    chosen = numbers(sharing, choose("stack", stack, list(dict.fromkeys(sharing["stack"]))))
    if ax is None:
        return draw(chosen, style)
    module = choose("module", module, list(dict.fromkeys(chosen["module"])))
    _panel(ax, chosen[chosen["module"] == module])
    return ax


@plots_of(plot_layers_share, order=14, needs="sharing", name="layers_share")
def plots(sharing: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    stacks = list(dict.fromkeys(sharing["stack"]))
    for stack in stacks:
        stem = "layers_share" if len(stacks) == 1 else f"layers_share_{slug(stack)}"
        yield Plot(stem, numbers(sharing, stack), draw)


def numbers(sharing: pd.DataFrame, stack: str) -> pd.DataFrame:
    """One row for each layer, type of module and fit: the energy kept, and that by chance."""
    rows = sharing[(sharing["unit"] == "layer") & (sharing["stack"] == stack)]
    return rows[["stack", "module", "scales", "layer", "energy", "chance"]].reset_index(drop=True)


@styled
def draw(numbers: pd.DataFrame, style: Style) -> Figure:
    modules = list(dict.fromkeys(numbers["module"]))
    columns = min(len(modules), 2)
    rows = -(-len(modules) // columns)
    figure = Figure(figsize=(style.widest, 0.9 + 1.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax, module in zip(axes.flat, modules, strict=False):
        _panel(ax, numbers[numbers["module"] == module])
        ax.set_title(module, parse_math=False)
    for ax in axes.flat[len(modules) :]:
        ax.remove()
    for ax in axes[:, 0]:
        ax.set_ylabel("energy kept")
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    scales = list(dict.fromkeys(numbers["scales"]))
    lines = [Line2D([], [], color=colour) for _, colour in zip(scales, PALETTE, strict=False)]
    lines.append(Line2D([], [], color="0.3", linestyle=_CHANCE))
    text.legend_below(figure, lines, [*scales, "by chance"])
    text.title(figure, "What could layers share?", "of each layer's update, by scales in common")
    text.fit(figure)
    layers = sorted(set(numbers["layer"]))
    label_layers(figure, [ax.xaxis for ax in axes[-1]], [int(layer) for layer in layers])
    return figure


def _panel(ax: Axes, rows: pd.DataFrame) -> None:
    for scales, colour in zip(dict.fromkeys(rows["scales"]), PALETTE, strict=False):
        of_fit = rows[rows["scales"] == scales]
        place = range(len(of_fit))
        marker = "o" if len(of_fit) <= 12 else ""
        ax.plot(place, of_fit["energy"], color=colour, marker=marker, markersize=2.5, clip_on=False)
        ax.plot(place, of_fit["chance"], color=colour, linestyle=_CHANCE)
    ax.set_ylim(min(0.0, rows["chance"].min()), 1)
    ax.spines[["top", "right"]].set_visible(False)
