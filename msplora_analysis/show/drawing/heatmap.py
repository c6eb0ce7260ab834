"""Heat maps, their sizes, and a label for every layer that there is room for."""

from collections.abc import Iterator, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from msplora_analysis.compute.measures.metrics import Array
from msplora_analysis.show.drawing.colours import NO_DATA
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.style import SMALLEST
from msplora_analysis.show.drawing.text import fit, lay_out, size_of
from msplora_analysis.show.drawing.venues import Style

NARROW = 4.5  # inches, below which panels stand one above the other
_MARGIN = 1.3  # inches beside the cells, at most: tick labels, axis label, colour bar
_PITCH = 7.0  # points from one label to the next, at least, in the smallest letters
_LARGEST = 4.6  # inches that a square of few layers may be wide
_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)


def colour_scale(highest: float, lowest: float = 0) -> Normalize:
    """Colours that reach from `lowest` to `highest`, or to 1 if that is not positive."""
    return Normalize(lowest, highest if highest > 0 else 1)


def draw_cells(
    ax: Axes, values: Array, norm: Normalize, cmap: str, *, x_edges: Array | None = None, first_row: float = 0
) -> QuadMesh:
    """Cells of one colour each, the first row at the top; NaN is grey.

    Args:
        ax: Where to draw.
        values: Shape (rows, columns).
        norm: Of `colour_scale`; panels that share a colour bar share it.
        cmap: Name of a colour map.
        x_edges: Shape (columns + 1); without it, column j is centred on j.
        first_row: Where the first row is centred.
    """
    ax.set_facecolor(NO_DATA)
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


def width_for(style: Style, layers: int, beside: float = 0) -> float:
    """The narrowest width in which every layer can be labelled, else every 2nd, 4th, ...

    Args:
        style: Its widths are those to choose from.
        layers: How many stand side by side.
        beside: Inches that something else takes.

    Returns:
        Inches.
    """
    for step in (1,) if style.grows else _STEPS:
        for width in style.widths:
            if step * _pitch_of(width - beside, layers) >= _PITCH:
                return width
    return layers * _PITCH / 72 + _MARGIN + beside


def square_panels(style: Style, layers: list[int], panels: int) -> tuple[Figure, list[Axes]]:
    """A figure of squares, layer i down and layer j across.

    The panels stand side by side where there is room for that, else one above the other.

    Args:
        style: How wide it may be.
        layers: Down and across each square.
        panels: How many squares.
    """
    n, full = len(layers), style.widest
    every = _pitch_of(full, n, panels) >= _PITCH
    abreast = panels > 1 and (every if style.grows else full >= NARROW)
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
    figure.set_figheight(figure.get_tightbbox().height + 0.08)


def label_layers(figure: Figure, axes: Sequence[Axis], layers: list[int]) -> None:
    """A tick label for every layer; where there is no room, for every 2nd, 4th, ..., and a small tick for each other.

    In the largest letters that fit, and across the page lying down if they can.
    """
    fit(figure)
    chosen: list[tuple[int, float, bool]] = []
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
