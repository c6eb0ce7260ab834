"""Heat maps whose every layer is labelled, and the sizes that leave room for that."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from msplora_analysis.measures.metrics import Array

from .style import DOUBLE, NO_DATA, SINGLE, WIDE

_MARGIN = 1.3  # inches beside the cells, at most: tick labels, axis label, colour bar
_PITCH = 5.1  # points from one label to the next, at least


def draw_cells(ax: Axes, x_edges: Array, y_edges: Array, values: Array, norm: Normalize, cmap: str) -> QuadMesh:
    """Cells of one colour each, the first row at the top; NaN is grey."""
    ax.set_facecolor(NO_DATA)
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


def edges(count: int, first: float = 0) -> Array:
    """Edges of `count` cells of width 1, the first centred on `first`."""
    return np.arange(count + 1, dtype=np.float64) + first - 0.5


def width_for(layers: int) -> float:
    """The narrowest paper width at which every label stays legible; wider than a page only if that takes it."""
    for width, spare in ((SINGLE, 1.3), (WIDE, 1.3), (DOUBLE, 1.0)):
        if pitch_of(width, layers) >= spare * _PITCH:
            return width
    return layers * _PITCH / 72 + _MARGIN


def square_panels(layers: list[int], panels: int) -> tuple[Figure, list[Axes]]:
    """A figure of squares, layer i down and layer j across, every layer labelled.

    The panels stand side by side while the labels stay legible so, else one above the other.
    """
    n = len(layers)
    abreast = panels > 1 and pitch_of(DOUBLE, n, panels) >= _PITCH
    width = DOUBLE if abreast else width_for(n)
    rows, columns = (1, panels) if abreast else (panels, 1)
    pitch = pitch_of(width, n, columns)
    figure = Figure(figsize=(width, rows * (pitch * n / 72 + 0.6) + 0.6), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw={"aspect": "equal"}).ravel().tolist()
    for ax in axes:
        label_layers(ax.xaxis, layers, pitch)
        label_layers(ax.yaxis, layers, pitch)
        ax.set(xlabel="layer j", ylabel="layer i")
    return figure, axes


def wide_panel(layers: list[int], rows: int) -> tuple[Figure, Axes]:
    """A figure of one panel with `rows` cells down and the layers across, every layer labelled."""
    width = width_for(len(layers))
    figure = Figure(figsize=(width, 1.0 + 0.15 * rows), layout="constrained")
    ax = figure.subplots()
    label_layers(ax.xaxis, layers, pitch_of(width, len(layers)))
    ax.set_xlabel("layer")
    return figure, ax


def trim(figure: Figure) -> None:
    """Take away the height that squares, limited by the width, leave blank."""
    figure.draw_without_rendering()
    figure.set_figheight(figure.get_tightbbox().height + 0.08)


def label_layers(axis: Axis, layers: list[int], pitch: float) -> None:
    """One tick label per layer, none left out, in the largest font (up to 7 points) that keeps neighbours apart."""
    size = min(7.0, 0.85 * pitch)
    # Numbers across the page lie down while they fit; 0.64 em is the width of a digit.
    turned = isinstance(axis, XAxis) and 0.64 * len(str(max(layers))) * size > 0.85 * pitch
    axis.set_ticks(range(len(layers)), [str(layer) for layer in layers])
    axis.set_tick_params(labelsize=size, labelrotation=90 if turned else 0, length=min(2.5, 0.3 * pitch))


def pitch_of(width: float, layers: int, columns: int = 1) -> float:
    """Points from one label to the next, at least, with `columns` panels abreast in a figure of `width` inches."""
    return (width - _MARGIN - 0.5 * (columns - 1)) / columns * 72 / layers
