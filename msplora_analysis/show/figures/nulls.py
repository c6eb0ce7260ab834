"""What layers share, beside null models: other seeds, random directions, and layers rotated at random."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from msplora_analysis.show.drawing import text
from msplora_analysis.show.drawing.colours import PALETTE
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.matrices import choose, slug

_KINDS = {
    "same_layer": ("same layer, two seeds", "D"),
    "adjacent": ("neighbours, one run", "o"),
    "across": ("neighbours, two seeds", "s"),
    "chance": ("chance", "|"),
}
_LABELS = {name: LABELS[name] for name in ("overlap_in", "overlap_out", "shared_in", "shared_out")}


def plot_nulls(
    nulls: pd.DataFrame, *, method: str | None = None, ax: Axes | None = None, style: str | None = None
) -> Axes | Figure:
    """Overlap and shared energy of neighbours, beside those of runs with another seed, of one layer, and of chance.

    The table is `summary` of `load_nulls`; `method` chooses where it has several. With `ax`, the part `update` is
    drawn there, and `ax` returned.

    Example:
        >>> ma.plot_nulls(ma.load_nulls(["runs/lora", "runs/msplora"]).summary, method="LoRA r=8")
    """
    rows = nulls[nulls["method"] == choose("method", method, list(dict.fromkeys(nulls["method"])))]
    if ax is None:
        return draw(rows, style)
    _panel(ax, rows[rows["part"] == "update"])
    return ax


@plots_of(plot_nulls, order=13, needs="nulls", name="nulls")
def plots(nulls: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    for method, rows in nulls.groupby("method", sort=False):
        yield Plot(f"nulls_{slug(str(method))}", rows.reset_index(drop=True), draw)


@styled
def draw(numbers: pd.DataFrame, style: Style) -> Figure:
    parts = list(dict.fromkeys(numbers["part"]))
    figure = Figure(figsize=(style.widest, 1.9), layout="constrained")
    axes = figure.subplots(1, len(parts), sharex=True, sharey=True, squeeze=False)[0]
    for ax, part in zip(axes, parts, strict=True):
        _panel(ax, numbers[numbers["part"] == part])
        ax.set_title({"update": "whole update", "learned": "learned part", "task": "task directions"}[part])
    handles = axes[0].get_lines()[: len(_KINDS)]
    text.legend_below(figure, handles, [label for label, _ in _KINDS.values()])
    first = numbers.iloc[0]
    text.title(
        figure, first["method"], f"{first['runs']} runs on {first['tasks']} task{'s' if first['tasks'] > 1 else ''}"
    )
    text.fit(figure)
    return figure


def _panel(ax: Axes, rows: pd.DataFrame) -> None:
    measures = list(dict.fromkeys(rows["measure"]))
    place = np.arange(len(measures))
    for (kind, (_, marker)), colour in zip(_KINDS.items(), PALETTE, strict=False):
        by_chance = kind == "chance"
        ax.plot(rows[kind], place, marker, color="0.3" if by_chance else colour, markersize=8 if by_chance else 4)
    ax.set_yticks(place, [_LABELS[name] for name in measures])
    ax.set_ylim(len(measures) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_xlabel("share")
    ax.spines[["top", "right"]].set_visible(False)
