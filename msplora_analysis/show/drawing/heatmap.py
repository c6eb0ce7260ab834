"""Heat maps, their sizes, and a label for every layer that there is room for."""

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.patches import Rectangle

from msplora_analysis.compute.measures.metrics import Array
from msplora_analysis.formats.names import in_model_order
from msplora_analysis.show.drawing.colours import NO_DATA, SEQUENTIAL
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS, log_ticks
from msplora_analysis.show.drawing.style import SMALLEST
from msplora_analysis.show.drawing.text import broken, fit, lay_out, size_of
from msplora_analysis.show.drawing.venues import Style

NARROW = 4.5  # inches, below which panels stand one above the other
_MARGIN = 1.3  # inches beside the cells, at most: tick labels, axis label, colour bar
LETTERS = 20  # of a module's name on one line
_PITCH_OF_NUMBERS = 11.5  # points for 4.5 in the smallest letters
_PITCH = 7.0  # points from one label to the next, at least, in the smallest letters
_LARGEST = 4.6  # inches that a square of few layers may be wide
_DECADES = 1e-4
_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)


def colour_scale(highest: float, lowest: float = 0) -> Normalize:
    """Colours that reach from `lowest` to `highest`, or to 1 if that is not positive."""
    return Normalize(lowest, highest if highest > 0 else 1)


def log_scale(values: Array) -> Normalize:
    """Logarithmic colours of what is positive, over four decades at most; `colour_scale` where nothing is."""
    positive = values[values > 0]
    if not len(positive) or not np.isfinite(positive).all():
        return colour_scale(1)
    highest = float(positive.max())
    lowest = max(float(positive.min()), highest * _DECADES)
    return LogNorm(lowest if lowest < highest else highest / 10, highest)


def colour_bar(cells: QuadMesh, axes: Axes | Sequence[Axes], label: str, **how: Any) -> Colorbar:
    """A colour bar with ticks that are read at once, also where colours are logarithmic."""
    figure = (axes if isinstance(axes, Axes) else axes[0]).get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(cells, ax=axes, label=label, **how)
    if isinstance(cells.norm, LogNorm):
        ticks = log_ticks(float(cells.norm.vmin or 1), float(cells.norm.vmax or 1))
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
        bar.minorticks_off()
    return bar


def write_numbers(cells: QuadMesh, values: Array, form: str = "{:.1f}") -> None:
    """The number of every cell on it, if there is room for all of them; call it once the panel has its place.

    Args:
        cells: Of `draw_cells`, one column wide each.
        values: Shape (rows, columns).
        form: How to write one.
    """
    ax = cells.axes
    assert isinstance(ax, Axes)
    rows, columns = values.shape
    box, points = ax.get_window_extent(), 72 / ax.figure.dpi
    texts = [["" if np.isnan(value) else form.format(value) for value in row] for row in values]
    longest = max((len(text) for row in texts for text in row), default=0)
    room = min(box.width * points / columns / (0.62 * max(longest, 1) + 0.3), box.height * points / rows / 1.15)
    size = min(room, float(mpl.rcParams["font.size"]))
    if size < SMALLEST:
        return
    colours = np.asarray(cells.cmap(cells.norm(values)))
    bright = (colours[..., :3] @ np.array([0.299, 0.587, 0.114])) > 0.55
    first = min(ax.get_ylim()) + 0.5
    for (row, column), light in np.ndenumerate(bright):
        colour = "black" if light else "white"
        text = ax.text(column, first + row, texts[row][column], ha="center", va="center", color=colour, fontsize=size)
        text.set_in_layout(False)


def draw_cells(
    ax: Axes,
    values: Array,
    norm: Normalize,
    cmap: str | Colormap,
    *,
    x_edges: Array | None = None,
    first_row: float = 0,
    empty: str = NO_DATA,
) -> QuadMesh:
    """Cells of one colour each, the first row at the top.

    Args:
        ax: Where to draw.
        values: Shape (rows, columns).
        norm: Of `colour_scale`; panels that share a colour bar share it.
        cmap: A colour map.
        x_edges: Shape (columns + 1); without it, column j is centred on j.
        first_row: Where the first row is centred.
        empty: The colour of NaN.
    """
    ax.set_facecolor(empty)
    rows, columns = values.shape
    x_edges = np.arange(columns + 1) - 0.5 if x_edges is None else x_edges
    y_edges = np.arange(rows + 1) + first_row - 0.5
    # Edges in the colour of the face hide the hairlines that viewers leave between neighbouring cells.
    cells = ax.pcolormesh(x_edges, y_edges, values, norm=norm, cmap=cmap, edgecolors="face", linewidth=0.1)
    ax.set_ylim(y_edges[-1], y_edges[0])
    ax.spines[:].set_visible(False)
    return cells


def mark_absent(ax: Axes, x_edges: Array, top: float, bottom: float, text: str) -> None:
    """Hatch the rows that a part of low rank does not have, and say why."""
    width, height = x_edges[-1] - x_edges[0], bottom - top
    ax.add_patch(Rectangle((x_edges[0], top), width, height, facecolor="white", edgecolor="0.8", hatch="////", lw=0))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    ax.text((x_edges[0] + x_edges[-1]) / 2, (top + bottom) / 2, text, ha="center", va="center", color="0.35", bbox=box)


def width_for(style: Style, layers: int, beside: float = 0, pitch: float = _PITCH) -> float:
    """The narrowest width in which every layer can be labelled, else the last.

    Args:
        style: Its widths are those to choose from.
        layers: How many stand side by side.
        beside: Inches that something else takes.
        pitch: Points that a layer needs, as more than its label where numbers stand in the cells.

    Returns:
        Inches.
    """
    wide = (width for width in style.widths if _pitch_of(width - beside, layers) >= pitch)
    return next(wide, style.widest)


def square_panels(style: Style, layers: list[int], panels: int) -> tuple[Figure, list[Axes]]:
    """A figure of squares, layer i down and layer j across.

    The panels stand side by side in a figure as wide as a page, else one above the other.

    Args:
        style: How wide it may be.
        layers: Down and across each square.
        panels: How many squares.
    """
    n, full = len(layers), style.widest
    abreast = panels > 1 and full >= NARROW
    width = full if abreast else width_for(style, n)
    rows, columns = (1, panels) if abreast else (panels, 1)
    side = n * _pitch_of(width, n, columns) / 72
    if n * _PITCH / 72 < _LARGEST:
        side = min(side, _LARGEST)
    figure = Figure(figsize=(width, rows * (side + 0.6) + 0.6), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw={"aspect": "equal"}).ravel().tolist()
    for ax in axes:
        ax.set(xlabel=LABELS["layer_j"], ylabel=LABELS["layer_i"])
    return figure, axes


def finish_squares(figure: Figure, axes: Sequence[Axes], layers: list[int]) -> None:
    """Take away the height that squares, limited by the width, leave blank, and label the layers."""
    label_layers(figure, [axis for ax in axes for axis in (ax.xaxis, ax.yaxis)], layers)
    height = figure.get_tightbbox().height + 0.08
    if abs(height - figure.get_figheight()) > 0.01:
        figure.set_figheight(height)
        lay_out(figure)


def module_panels(
    style: Style, numbers: pd.DataFrame, panels: int, more: Sequence[float] = ()
) -> tuple[Figure, list[Axes], list[int]]:
    """A figure of maps one above the other, layers across and modules down; and the layers.

    Args:
        style: How wide it may be.
        numbers: With the columns `layer` and `module`.
        panels: How many maps.
        more: Inches that further panels below them are high.
    """
    layers = sorted(int(layer) for layer in numbers["layer"].dropna().unique())
    modules = [broken(module, LETTERS) for module in numbers["module"].dropna().unique()]
    longest = max(len(line) for name in modules for line in name.split("\n"))
    width = width_for(style, len(layers), beside=0.05 * longest, pitch=_PITCH_OF_NUMBERS)
    row = 0.05 + 0.12 * max(name.count("\n") + 1 for name in modules)
    heights = [row * len(modules)] * panels + list(more)
    figure = Figure(figsize=(width, 0.7 + sum(heights) + 0.5 * len(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0].tolist()
    return figure, axes, layers


def draw_modules(
    ax: Axes, numbers: pd.DataFrame, column: str, norm: Normalize, cmap: str = SEQUENTIAL
) -> tuple[QuadMesh, Array]:
    """One map: layers across, modules down in the order of a model. Returns the cells and their values.

    Args:
        ax: Where to draw.
        numbers: One row for each layer and module.
        column: What of them.
        norm: See `draw_cells`.
        cmap: See `draw_cells`.
    """
    layers = sorted(numbers["layer"].dropna().unique())
    modules = in_model_order(numbers["module"])
    table = numbers.pivot(index="module", columns="layer", values=column).reindex(index=modules, columns=layers)
    values = table.to_numpy(np.float64)
    cells = draw_cells(ax, values, norm, cmap)
    ax.set_yticks(range(len(modules)), [broken(module, LETTERS) for module in modules], parse_math=False)
    tick_layers(ax.xaxis, [int(layer) for layer in layers])
    return cells, values


def tick_layers(axis: Axis, layers: list[int]) -> None:
    """Ticks for layers in a panel of unknown size, about ten of them labelled."""
    step = next((step for step in _STEPS if len(layers) / step <= 12), _STEPS[-1])
    axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def label_layers(figure: Figure, axes: Sequence[Axis], layers: list[int]) -> None:
    """A tick label for every layer; where there is no room, for every 2nd, 4th, ..., and a small tick for each other.

    In the largest letters that fit, and across the page lying down if they can.
    """
    chosen = [_choose(axis, layers) for axis in axes]  # near what fits, so that one layout often does
    for axis, choice in zip(axes, chosen, strict=True):
        _label(axis, layers, *choice)
    fit(figure)
    for _ in range(3):  # labels change the room that the layout leaves for them
        known, chosen = chosen, [_choose(axis, layers) for axis in axes]
        if chosen == known:
            return
        for axis, choice in zip(axes, chosen, strict=True):
            _label(axis, layers, *choice)
        lay_out(figure)


def _choose(axis: Axis, layers: list[int]) -> tuple[int, float, bool]:
    """Every how many-th layer to label, in letters of which size, and whether to turn them."""
    pitch = _length(axis) / len(layers)
    fitting = (choice[:3] for choice in _choices(axis, layers) if choice[3] <= choice[0] * pitch)
    return next(fitting, (len(layers), SMALLEST, False))


def _length(axis: Axis) -> float:
    box = axis.axes.get_window_extent()
    return float(box.width if isinstance(axis, XAxis) else box.height) * 72 / axis.axes.figure.dpi


def _label(axis: Axis, layers: list[int], step: int, size: float, turned: bool) -> None:
    places = list(range(0, len(layers), step))
    axis.set_ticks(places, [str(layers[place]) for place in places])
    axis.set_ticks([place for place in range(len(layers)) if place % step], minor=True)
    axis.set_tick_params(labelsize=size, labelrotation=90 if turned else 0)


def _choices(axis: Axis, layers: list[int]) -> Iterator[tuple[int, float, bool, float]]:
    """Step, size of the letters, whether they are turned, and the points that one label then needs; the best first."""
    largest = float(mpl.rcParams["xtick.labelsize"])
    sizes = np.unique([*np.arange(SMALLEST, largest, 0.5), largest])[::-1]
    text = axis.axes.text(0, 0, "0" * max(len(str(layer)) for layer in layers))
    needs = []
    for size in sizes.tolist():
        text.set_fontsize(size)
        width, height = size_of(text)
        if isinstance(axis, XAxis):
            needs.append((size, False, width + 0.35 * size))
        needs.append((size, isinstance(axis, XAxis), height + 0.4))
    text.remove()
    for step in _STEPS:
        for size, turned, need in sorted(needs, key=lambda each: (each[1], -each[0])):
            yield step, size, turned, need


def _pitch_of(width: float, layers: int, columns: int = 1) -> float:
    """Points from one layer to the next, at least, with `columns` panels abreast in a figure of `width` inches."""
    return (width - _MARGIN - 0.5 * (columns - 1)) / columns * 72 / layers
