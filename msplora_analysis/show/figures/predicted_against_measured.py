"""The KL that moments predict for each cut, against the one that was measured."""

from collections.abc import Iterator
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing import colours, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.ablation import adapter_name, each_adapter, kl_label, metric_label, one_adapter
from msplora_analysis.tables.matrices import slug

_FACTOR = 2.0
_NAMES = {
    "module": "module",
    "layer": "layer",
    "type": "type",
    "scale": "scale",
    "only_scale": "scale alone",
    "rank": "rank",
    "rank_task": "rank, task-weighted",
}
_MARKERS = "os^Dv<>"


def plot_predicted_against_measured(
    ablation: pd.DataFrame,
    *,
    run: str | None = None,
    step: int | None = None,
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """Predicted KL of each cut against the measured one, both logarithmic, with the band of a factor of 2.

    The table is that of `load_ablation`; `run` and `step` choose where it has several adapters. With `ax`, it is drawn
    there, and `ax` returned.

    Example:
        >>> ma.plot_predicted_against_measured(ma.load_ablation("runs/cola"))
    """
    chosen = numbers(one_adapter(ablation, run, step))
    if chosen.empty:
        raise AnalysisError("the table predicts no KL: record moments beside the adapter, and measure it again")
    if ax is None:
        return draw(chosen, style)
    _panel(ax, chosen)
    return ax


@plots_of(plot_predicted_against_measured, order=13, needs="ablation", name="predicted_against_measured")
def plots(ablation: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    for name, table in each_adapter(ablation):
        yield Plot("_".join(filter(None, ["predicted_against_measured", slug(name)])), numbers(table), draw, name)


def numbers(ablation: pd.DataFrame) -> pd.DataFrame:
    """One row for each cut that was predicted to cost something, and did: both KLs and their ratio."""
    table = ablation[(ablation["kl"] > 0) & (ablation["predicted_kl"] > 0)]
    table = table.assign(metric_name=metric_label(ablation))
    columns = ["run", "step", "metric_name", "cut", "what", "rank", "predicted_kl", "kl"]
    return table[columns].assign(ratio=table["kl"] / table["predicted_kl"]).reset_index(drop=True)


@styled
def draw(numbers: pd.DataFrame, style: Style) -> Figure:
    width = style.widths[0]
    figure = Figure(figsize=(width, width + 0.4), layout="constrained")
    ax = figure.subplots()
    _panel(ax, numbers)
    handles, names = ax.get_legend_handles_labels()
    text.legend_below(figure, handles, names)
    inside = np.abs(np.log(numbers["ratio"])) <= np.log(_FACTOR)
    note = f"{inside.sum()} of {len(numbers)} cuts within a factor of {_FACTOR:g}"
    text.title(figure, f"Predicted and measured: {adapter_name(numbers)}", note)
    text.fit(figure)
    return figure


def _panel(ax: Axes, numbers: pd.DataFrame) -> None:
    both = numbers[["predicted_kl", "kl"]].to_numpy()
    ends = np.array([both.min() / 1.5, both.max() * 1.5])
    ax.fill_between(
        ends, ends / _FACTOR, ends * _FACTOR, color="0.9", linewidth=0, label=f"within a factor of {_FACTOR:g}"
    )
    ax.plot(ends, ends, color="0.5", linewidth=0.8)
    looks = zip(cycle(colours.PALETTE), cycle(_MARKERS), strict=False)
    for (cut, points), (colour, marker) in zip(numbers.groupby("cut", sort=False), looks, strict=False):
        name = _NAMES.get(str(cut), str(cut))
        ax.plot(points["predicted_kl"], points["kl"], marker, color=colour, markersize=3.5, alpha=0.85, label=name)
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    label = kl_label(numbers["metric_name"].iloc[0])
    ax.set(xlabel=f"predicted {label}", ylabel=f"measured {label}")
    ax.spines[["top", "right"]].set_visible(False)
