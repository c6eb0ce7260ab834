"""Two methods side by side: differences between layers with their intervals, from the table of `compare`."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.matrices import choose
from msplora_analysis.tables.rows import rows_of

_NAMES = {"kl": "KL, as Figure 4"} | {name: LABELS[name] for name in ("kl_matched", "js", "overlap_in", "overlap_out")}
_FAMILIES = {
    "kl": LABELS["kl_difference"],
    "js": LABELS["js_difference"],
    "overlap": LABELS["overlap_difference"],
}
_PAIRS = {"all": ("all pairs", "o"), "adjacent": ("adjacent layers", "s")}


def plot_comparison(
    comparison: pd.DataFrame, *, family: str | None = None, ax: Axes | None = None, style: str | None = None
) -> Axes | Figure:
    """Difference between two methods of each measure, a − b, with its interval; filled where the data decide.

    `comparison` is the table of `msplora_analysis.compare`. KL, JS and overlaps have a panel each. With `ax`, that of
    one `family` ("kl", "js" or "overlap") is drawn there, and `ax` returned.

    Example:
        >>> ma.plot_comparison(ma.compare("runs/msplora", "runs/lora"))
    """
    for plot in plots(comparison, None):
        if ax is None:
            return draw(plot.numbers, style)
        there = [name for name in _FAMILIES if plot.numbers["measure"].str.startswith(name).any()]
        family = choose("family", family, there)
        _panel(ax, plot.numbers[plot.numbers["measure"].str.startswith(family)], _FAMILIES[family])
        return ax
    raise AnalysisError("the comparison table holds no differences: pass what compare returns")


@plots_of(plot_comparison, order=10, needs="comparison", name="comparison")
def plots(comparison: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    rows = comparison[comparison["question"] == "difference"]
    if rows["k_a"].eq(rows["k_b"]).all():
        rows = rows[rows["measure"] != "kl_matched"]  # what kl says
    if len(rows):
        yield Plot("comparison_differences", rows, draw)


@styled
def draw(rows: pd.DataFrame, style: Style) -> Figure:
    families = [name for name in _FAMILIES if rows["measure"].str.startswith(name).any()]
    width = style.widest if len(families) > 1 else style.widths[0]
    abreast = width >= heatmap.NARROW
    figure = Figure(figsize=(width, 1.9 if abreast else 0.7 + 1.2 * len(families)), layout="constrained")
    rows_, columns = (1, len(families)) if abreast else (len(families), 1)
    axes = figure.subplots(rows_, columns, squeeze=False).ravel()
    for ax, family in zip(axes, families, strict=True):
        _panel(ax, rows[rows["measure"].str.startswith(family)], _FAMILIES[family])
    first = rows.iloc[0]
    handles = [
        axes[0].plot([], [], marker, color=colours.PALETTE[i], markersize=4, label=label)[0]
        for i, (label, marker) in enumerate(_PAIRS.values())
    ]
    text.legend_below(figure, handles, [label for label, _ in _PAIRS.values()])
    has_interval = rows["low"].notna().any()
    text.title(
        figure,
        f"{first['a']} − {first['b']}",
        f"{first['confidence']:.0%} intervals" if has_interval else "too few runs for intervals",
        f"{first['n_a']:g} and {first['n_b']:g} runs; filled: decided",
    )
    text.fit(figure)
    text.thin_ticks(figure.axes)
    return figure


def _panel(ax: Axes, rows: pd.DataFrame, label: str) -> None:
    measures = [name for name in _NAMES if name in set(rows["measure"])]
    ax.axvline(0, color="0.6", linewidth=0.6)
    for i, (pairs, (_, marker)) in enumerate(_PAIRS.items()):
        for row in rows_of(rows[rows["pairs"] == pairs]):
            y = measures.index(row["measure"]) + 0.3 * (i - 0.5)
            if np.isfinite(row["low"]):
                ax.plot([row["low"], row["high"]], [y, y], color=colours.PALETTE[i], linewidth=1)
            face = colours.PALETTE[i] if row["decided"] else "white"
            ax.plot(row["estimate"], y, marker, color=colours.PALETTE[i], markerfacecolor=face, markersize=4)
    ax.set_yticks(range(len(measures)), [_NAMES[name] for name in measures])
    ax.set_ylim(len(measures) - 0.5, -0.5)
    ax.margins(x=0.1)
    ax.locator_params(axis="x", nbins=4)
    ax.set_xlabel(label)
    ax.spines[["top", "right"]].set_visible(False)
