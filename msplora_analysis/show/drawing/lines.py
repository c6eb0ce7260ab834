"""Lines over the epochs: one column of panels per scale, one row per quantity, one line per method."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from msplora_analysis.compute.measures.metrics import Array
from msplora_analysis.formats.updates import SCALES
from msplora_analysis.show.drawing.colours import PALETTE
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.style import DASHES, Dash, styled
from msplora_analysis.show.drawing.text import fit, label_epochs, legend_below, title
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.checkpoints import epochs_of
from msplora_analysis.tables.matrices import is_msplora, method_labels

SHARED = ["variant", "scale", "epoch"]


def over_epochs(matrices: pd.DataFrame, quantities: dict[str, Array], scales: Sequence[str] = SCALES) -> pd.DataFrame:
    """Mean and standard deviation of a number per matrix, for each method of two or more epochs, scale and epoch.

    The number is averaged within each run over its matrices (groups, modules), leaving out all-zero ones (NaN); `mean`
    and `std` (n − 1) are those of the runs' averages. Where MSPLoRA runs have a `total`, the single part of a LoRA run,
    which is its total, stands there too. `scales` is their order.
    """
    table = matrices[["run", *SHARED]].assign(**quantities)
    timed = [v for v in method_labels(matrices) if len(epochs_of(matrices[matrices["variant"] == v])) > 1]
    table = table[table["variant"].isin(timed)]
    if (table["scale"] == "total").any():
        table = pd.concat([table, table[~table["variant"].map(is_msplora).astype(bool)].assign(scale="total")])
    per_run = table.groupby([*SHARED, "run"])[list(quantities)].mean()
    spread = per_run.melt(var_name="quantity", ignore_index=False).groupby([*SHARED, "quantity"])["value"]
    result = spread.agg(["mean", "std", "size"]).reset_index().rename(columns={"size": "runs"})
    for column, order in (("variant", timed), ("scale", scales), ("quantity", list(quantities))):
        result[column] = pd.Categorical(result[column], pd.Index(order))
    result = result.sort_values(["variant", "scale", "quantity", "epoch"], ignore_index=True)
    return result.astype({"variant": str, "scale": str, "quantity": str})


@styled
def draw_lines(
    numbers: pd.DataFrame,
    style: Style,
    *,
    heading: str,
    quantities: Sequence[str],
    order: Sequence[str] = SCALES,
    least: float = 1.0,
) -> Figure:
    """Panels of `numbers` as `over_epochs` gives them, one row for each of the quantities.

    The vertical axes reach from 0, or below the lowest value, to `least` at least. A column `chance` is drawn dotted.
    """
    scales = [scale for scale in order if scale in set(numbers["scale"])]
    looks = dict(zip(numbers["variant"].unique(), zip(cycle(PALETTE), cycle(DASHES), strict=False), strict=False))
    figure = Figure(figsize=(style.widest, 0.8 + 1.3 * len(quantities)), layout="constrained")
    axes = figure.subplots(len(quantities), len(scales), sharex=True, sharey="row", squeeze=False)
    for row, quantity in zip(axes, quantities, strict=True):
        for ax, scale in zip(row, scales, strict=True):
            panel = numbers[(numbers["quantity"] == quantity) & (numbers["scale"] == scale)]
            for method, line in panel.groupby("variant", sort=False):
                _line(ax, line, *looks[method])
            ax.set_xlim(numbers["epoch"].min(), numbers["epoch"].max())
            ax.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(LABELS[quantity])
        of_row = numbers[numbers["quantity"] == quantity]
        spread = of_row["std"].fillna(0)
        lowest, highest = (of_row["mean"] - spread).min(), (of_row["mean"] + spread).max()
        row[0].set_ylim(1.03 * np.fmin(lowest, 0), 1.03 * np.fmax(highest, least) or 1)
    for ax, scale in zip(axes[0], scales, strict=True):
        ax.set_title(scale)
    label_epochs(axes[-1], len(scales))
    runs = numbers.groupby("variant", sort=False)["runs"].max()
    names = [f"{method}, {runs[method]} run{'s' if runs[method] > 1 else ''}" for method in looks]
    legend_below(figure, [Line2D([], [], color=colour, linestyle=dash) for colour, dash in looks.values()], names)
    title(figure, heading, "mean over runs, band ± 1 standard deviation" if runs.max() > 1 else "", math=True)
    fit(figure)
    return figure


def _line(ax: Axes, line: pd.DataFrame, colour: str, dash: Dash) -> None:
    marker = "o" if line["mean"].notna().sum() <= 12 else ""
    ax.plot(line["epoch"], line["mean"], color=colour, linestyle=dash, marker=marker, markersize=2, clip_on=False)
    if "chance" in line:
        ax.axhline(line["chance"].iloc[0], color=colour, linestyle=(0, (1, 2)), linewidth=0.8)
    low, high = line["mean"] - line["std"], line["mean"] + line["std"]
    ax.fill_between(line["epoch"], low, high, color=colour, alpha=0.18, linewidth=0)
