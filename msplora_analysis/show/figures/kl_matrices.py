"""The KL matrices themselves, beside Figure 4: how far the spectra of any two layers lie apart."""

from collections.abc import Iterator, Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, drawn, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables import layer_kl
from msplora_analysis.tables.matrices import choose, prepare, slug, stacks


def plot_kl_between_layers(
    spectra: pd.DataFrame,
    *,
    methods: Sequence[str] = (),
    stack: str | None = None,
    epoch: float | None = None,
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """D_KL(i‖j) between the `layer` parts, one square per method on one colour scale: layer i down, layer j across.

    Spectra are averaged over modules and runs first: `plot_overlap_between_layers` has the divergences of single
    modules, averaged after. Source: MSPLoRA, arXiv 2503.21838, eq. 9, 10.

    Args:
        spectra: Of `load_spectra`.
        methods: Labels; without, the only one there is.
        stack: Of numbered layers; None: the only one there is.
        epoch: None: the last that all methods share.
        ax: Where to draw the square of one method; None: a figure of all.
        style: The widths and letters of a venue.

    Returns:
        `ax`, or the figure.

    Raises:
        AnalysisError: The table has no such methods, stack or epoch.

    Example:
        >>> ma.plot_kl_between_layers(ma.load_spectra("examples/runs"), methods=["MSPLoRA 8/8/8", "LoRA r=8"])
    """
    matrices = prepare(spectra)
    stack = choose("stack", stack, stacks(matrices))
    layers = layer_kl.layers_of(matrices, stack)
    chosen = [choose("method", method, list(layers)) for method in methods or (None,)]
    if len({layers[method] for method in chosen}) > 1:
        raise AnalysisError(f"{', '.join(chosen)} adapt different layers: draw them one at a time")
    table = layer_kl.numbers(matrices, chosen, stack, epoch)
    if ax is None:
        painted = partial(draw, name_stack=len(stacks(matrices)) > 1)
        return drawn(painted, matrices[matrices["variant"].isin(chosen)], table, style)
    if len(chosen) > 1:
        raise AnalysisError(f"methods={list(methods)!r}: one ax has room for one method", "methods")
    cells = heatmap.draw_cells(ax, layer_kl.matrix(table), heatmap.colour_scale(table["kl"].max()), colours.SEQUENTIAL)
    heatmap.colour_bar(cells, ax, LABELS["kl"])
    heatmap.tick_layers(ax.xaxis, list(layers[chosen[0]]))
    heatmap.tick_layers(ax.yaxis, list(layers[chosen[0]]))
    ax.set(xlabel=LABELS["layer_j"], ylabel=LABELS["layer_i"], aspect="equal")
    return ax


@plots_of(plot_kl_between_layers, order=3, name="kl_between_layers")
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    """A companion to each Figure 4, and every label that has none by itself; then the means as tables."""
    several = len(stacks(matrices)) > 1
    for stack in stacks(matrices):
        together: list[tuple[str, ...]] = list(layer_kl.both_methods(matrices, stack))
        drawn = {method for pair in together for method in pair}
        alone = [(method,) for method in layer_kl.layers_of(matrices, stack) if method not in drawn]
        for methods in together + alone:
            stem = f"kl_between_layers_{'_and_'.join(map(slug, methods))}" + (f"_{slug(stack)}" if several else "")
            table = layer_kl.numbers(matrices, list(methods), stack, epoch)
            of = " and ".join(methods) + (f", {stack}" if several else "")
            yield Plot(stem, table, partial(draw, name_stack=several), of)
    yield Plot("kl_summary", layer_kl.summary(matrices, epoch))
    yield Plot("kl_per_run", layer_kl.per_run(matrices, epoch))


@styled
def draw(numbers: pd.DataFrame, style: Style, *, name_stack: bool = False) -> Figure:
    tables = [table for _, table in numbers.groupby("variant", sort=False)]
    layers = sorted(numbers["layer_i"].unique())
    figure, axes = heatmap.square_panels(style, layers, len(tables))
    norm = heatmap.colour_scale(numbers["kl"].max())
    for ax, table in zip(axes, tables, strict=True):
        cells = heatmap.draw_cells(ax, layer_kl.matrix(table), norm, colours.SEQUENTIAL)
        if len(tables) > 1:
            ax.set_title(table["variant"].iloc[0], parse_math=False)
    figure.colorbar(cells, ax=axes, label=LABELS["kl"], aspect=25, pad=0.02)
    alone = "" if len(tables) > 1 else f"{tables[0]['variant'].iloc[0]}: "
    heading = f"{alone}KL between layers, spectra averaged first"
    text.title_of_layers(figure, heading, numbers, [table["runs"].iloc[0] for table in tables], name_stack=name_stack)
    heatmap.finish_squares(figure, axes, layers)
    return figure
