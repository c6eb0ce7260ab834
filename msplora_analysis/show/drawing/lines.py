"""Lines over the epochs: one panel per method and quantity, one line per scale."""

from collections.abc import Sequence
from itertools import cycle, product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from msplora_analysis.compute.measures.metrics import Array
from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.updates import SCALES
from msplora_analysis.show.drawing.colours import PALETTE
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.style import DASHES, Dash, styled
from msplora_analysis.show.drawing.text import fit, label_epochs, legend_below, runs_note, title
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.checkpoints import epochs_of
from msplora_analysis.tables.matrices import choose, is_msplora, method_labels

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
    """Panels of `numbers` as `over_epochs` gives them: quantities across, methods of several scales down.

    A panel holds the line of each scale of its method, and dashed those of the methods of one scale. Where there are
    only such, they share a row. The vertical axes reach from 0, or below the lowest value, to `least` at least. A
    column `chance` is drawn dotted.
    """
    methods = panels_of(numbers)
    abreast = style.widest >= 4.5
    columns = len(quantities) if abreast else 1 + (len(methods) * len(quantities) > 6)
    rows = -(-len(methods) * len(quantities) // columns)
    figure = Figure(figsize=(style.widest, 0.8 + min(1.5, 7.5 / rows) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel().tolist()
    drawn: dict[str, tuple[str, Dash]] = {}
    for ax, (method, quantity) in zip(axes, product(methods, quantities), strict=False):
        drawn |= draw_panel(ax, numbers, method, quantity, order=order, least=least)
        ax.set_title(method or "", parse_math=False)
    used = len(methods) * len(quantities)
    for ax in axes[used:]:
        ax.remove()
    label_epochs(axes[max(0, used - columns) : used], columns, sorted(set(numbers["epoch"])))
    runs = numbers.groupby("variant", sort=False)["runs"].max()
    legend_below(figure, _handles(drawn), list(drawn))
    title(figure, heading, runs_note(runs.tolist()), "band ± 1 standard deviation" if runs.max() > 1 else "", math=True)
    fit(figure)
    return figure


def panels_of(numbers: pd.DataFrame) -> list[str | None]:
    """The methods that have panels of their own; None is the panel of all methods of one scale, without others."""
    methods = [str(method) for method in numbers["variant"].unique()]
    return [method for method in methods if is_msplora(method)] or [None]


def plot_lines(ax: Axes, numbers: pd.DataFrame, method: str | None, quantity: str, **how: Any) -> Axes:
    """One panel with its legend, in an `ax` that is given; `method` may be left out if only one has several scales."""
    if numbers.empty:
        raise AnalysisError("nothing to draw over epochs: no method has checkpoints of two or more")
    methods = panels_of(numbers)
    if method is not None or len(methods) > 1:
        method = choose("method", method, [str(each) for each in methods])
    looks = draw_panel(ax, numbers, method or methods[0], quantity, **how)
    ax.legend(_handles(looks), list(looks), frameon=False, fontsize="small")
    ax.set_xlabel(LABELS["epoch"])
    return ax


def draw_panel(
    ax: Axes,
    numbers: pd.DataFrame,
    method: str | None,
    quantity: str,
    *,
    order: Sequence[str] = SCALES,
    least: float = 1.0,
) -> dict[str, tuple[str, Dash]]:
    """The lines of one quantity: of the scales of a method, and of the methods of one scale. Returns their looks."""
    of_quantity = numbers[numbers["quantity"] == quantity]
    looks: dict[str, tuple[str, Dash]] = {}
    for scale, colour in zip([s for s in order if s in set(numbers["scale"])], PALETTE, strict=False):
        line = of_quantity[(of_quantity["variant"] == method) & (of_quantity["scale"] == scale)]
        if len(line):
            looks[scale] = colour, "-"
            _line(ax, line, *looks[scale])
    others = [name for name in numbers["variant"].unique() if not is_msplora(name)]
    plain = zip(cycle(["0.35"] if method else PALETTE), cycle(DASHES[1:] if method else DASHES), strict=False)
    for name, look in zip(others, plain, strict=False):
        looks[name] = look
        _line(ax, of_quantity[(of_quantity["variant"] == name) & (of_quantity["scale"] != "total")], *look)
    spread = of_quantity["std"].fillna(0)
    lowest, highest = (of_quantity["mean"] - spread).min(), (of_quantity["mean"] + spread).max()
    ax.set_ylim(1.03 * np.fmin(lowest, 0), 1.03 * np.fmax(highest, least) or 1)
    learned = numbers.loc[numbers["mean"].notna(), "epoch"]
    first, last = learned.min() if len(learned) else numbers["epoch"].min(), numbers["epoch"].max()
    ax.set_xlim(first - (first == last), last)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_ylabel(LABELS[quantity])
    return looks


def _handles(looks: dict[str, tuple[str, Dash]]) -> list[Line2D]:
    return [Line2D([], [], color=colour, linestyle=dash) for colour, dash in looks.values()]  # type: ignore[arg-type]


def _line(ax: Axes, line: pd.DataFrame, colour: str, dash: Dash) -> None:
    marker = "o" if line["mean"].notna().sum() <= 12 else ""
    ax.plot(line["epoch"], line["mean"], color=colour, linestyle=dash, marker=marker, markersize=2, clip_on=False)
    if "chance" in line:
        ax.axhline(line["chance"].iloc[0], color=colour, linestyle=(0, (1, 2)), linewidth=0.8)
    low, high = line["mean"] - line["std"], line["mean"] + line["std"]
    ax.fill_between(line["epoch"], low, high, color=colour, alpha=0.18, linewidth=0)
