"""In how few parameters the layers of a run have a basis in common, beside layers rotated at random."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from msplora_analysis.show.drawing import text
from msplora_analysis.show.drawing.colours import PALETTE
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style


def plot_joint_basis(joint: pd.DataFrame, *, ax: Axes | None = None, style: str | None = None) -> Axes | Figure:
    """Parameters of a common basis of the layers, over those for the same layers rotated at random; a dot is a run.

    The table is `joint` of `load_nulls`. With `ax`, all methods are drawn there, and `ax` returned.

    Example:
        >>> ma.plot_joint_basis(ma.load_nulls(["runs/lora", "runs/msplora"]).joint)
    """
    if ax is None:
        return draw(numbers(joint), style)
    _panel(ax, numbers(joint))
    return ax


@plots_of(plot_joint_basis, order=15, needs="joint", name="joint_basis")
def plots(joint: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    yield Plot("joint_basis", numbers(joint), draw)


def numbers(joint: pd.DataFrame) -> pd.DataFrame:
    """One row for each method, part, run and share of the energy: all its modules together."""
    keys = ["method", "part", "task", "run", "energy"]
    sums = joint.groupby(keys, sort=False)[["joint", "rotated", "separate"]].sum().reset_index()
    return sums.assign(of_rotated=sums["joint"] / sums["rotated"])


@styled
def draw(numbers: pd.DataFrame, style: Style) -> Figure:
    methods = list(dict.fromkeys(numbers["method"]))
    figure = Figure(figsize=(style.widest, 1.9), layout="constrained")
    axes = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)[0]
    for ax, method in zip(axes, methods, strict=True):
        _panel(ax, numbers[numbers["method"] == method])
        ax.set_title(method)
    axes[0].set_ylabel("parameters / rotated")
    parts = list(dict.fromkeys(numbers["part"]))
    text.legend_below(figure, axes[0].get_lines()[1 : len(parts) + 1], parts)
    text.title(figure, "One basis for all layers", "1: as many parameters as for layers rotated at random")
    text.fit(figure)
    return figure


def _panel(ax: Axes, rows: pd.DataFrame) -> None:
    shares = sorted(set(rows["energy"]))
    ax.axhline(1, color="0.6", linewidth=0.6)
    parts = list(dict.fromkeys(rows["part"]))
    for number, (part, colour) in enumerate(zip(parts, PALETTE, strict=False)):
        of_part = rows[rows["part"] == part]
        place = of_part["energy"].map(shares.index) + 0.2 * (number - (len(parts) - 1) / 2)
        ax.plot(place, of_part["of_rotated"], "o", color=colour, markersize=2.5, alpha=0.6)
    ax.set_xticks(np.arange(len(shares)), [f"{share:.0%}" for share in shares])
    ax.set_xlabel("energy kept")
    ax.set_ylim(0, 1.1 * max(1.0, float(rows["of_rotated"].max())))
    ax.spines[["top", "right"]].set_visible(False)
