"""What a model loses when every module is cut to a rank: by the plain spectrum, and by the task-weighted one."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing import colours, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import log_ticks
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.show.drawing.style import DASHES, styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.ablation import adapter_name, each_adapter, kl_label, metric_label, one_adapter
from msplora_analysis.tables.matrices import slug

_LINES = {"rank": "plain spectrum", "rank_task": "task-weighted spectrum"}


def plot_metric_against_rank(
    ablation: pd.DataFrame,
    *,
    run: str | None = None,
    step: int | None = None,
    quantity: str = "metric",
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """The metric, with 95 % intervals over examples, and the KL against the rank that every module is cut to.

    The table is that of `load_ablation`; `run` and `step` choose where it has several adapters. With `ax`, one of the
    two quantities ("metric" or "kl") is drawn there, and `ax` returned.

    Example:
        >>> ma.plot_metric_against_rank(ma.load_ablation("runs/cola"))
    """
    chosen = numbers(one_adapter(ablation, run, step))
    if chosen.empty:
        raise AnalysisError("the table has no cuts to ranks: pass what msplora-measure ablate wrote")
    if ax is None:
        return draw(chosen, style)
    if quantity not in ("metric", "kl"):
        raise AnalysisError(f"quantity={quantity!r}: expected metric or kl")
    (_metric if quantity == "metric" else _kl)(ax, chosen)
    return ax


@plots_of(plot_metric_against_rank, order=12, needs="ablation", name="metric_against_rank")
def plots(ablation: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    for name, table in each_adapter(ablation):
        yield Plot("_".join(filter(None, ["metric_against_rank", slug(name)])), numbers(table), draw, name)


def numbers(ablation: pd.DataFrame) -> pd.DataFrame:
    """One row for each cut to a rank: the metric with its interval, that of the whole adapter, and the KL."""
    whole = float(ablation.loc[ablation["cut"] == "none", "metric"].iloc[0])
    table = ablation[ablation["cut"].isin(_LINES)].sort_values(["cut", "rank"])
    return pd.DataFrame(
        {
            "run": table["run"],
            "step": table["step"],
            "metric_name": metric_label(ablation),
            "cut": table["cut"],
            "rank": table["rank"].astype(int),
            "parameters": table["parameters"],
            "metric": table["metric"],
            "low": whole + table["low"],
            "high": whole + table["high"],
            "whole": whole,
            "kl": table["kl"],
            "predicted_kl": table["predicted_kl"],
        }
    ).reset_index(drop=True)


@styled
def draw(numbers: pd.DataFrame, style: Style) -> Figure:
    abreast = style.widest >= 4.5
    figure = Figure(figsize=(style.widest, 2.4 if abreast else 4.2), layout="constrained")
    axes = figure.subplots(*((1, 2) if abreast else (2, 1)))
    _metric(axes[0], numbers)
    _kl(axes[1], numbers)
    handles, names = axes[0].get_legend_handles_labels()
    text.legend_below(figure, handles, names)
    text.title(figure, f"Every module cut to a rank: {adapter_name(numbers)}", "95 % intervals over examples")
    text.fit(figure)
    return figure


def _metric(ax: Axes, numbers: pd.DataFrame) -> None:
    for colour, dash, line, label in _lines(numbers):
        place = line["rank"] * (0.98 if label == _LINES["rank"] else 1.02)  # one interval beside the other
        error = np.abs(line[["low", "high"]].to_numpy().T - line["metric"].to_numpy())
        ax.errorbar(place, line["metric"], error, color=colour, linestyle=dash, marker="o", markersize=3, label=label)
    ax.axhline(numbers["whole"].iloc[0], color="0.4", linewidth=0.8, linestyle=(0, (1, 2)), label="the whole adapter")
    ax.set_ylabel(numbers["metric_name"].iloc[0])
    _ranks(ax, numbers)


def _kl(ax: Axes, numbers: pd.DataFrame) -> None:
    for colour, dash, line, label in _lines(numbers):
        ax.plot(line["rank"], line["kl"], color=colour, linestyle=dash, marker="o", markersize=3, label=label)
    if (numbers["kl"] > 0).any():
        ax.set_yscale("log")
        ticks = log_ticks(*ax.get_ylim())
        ax.set_yticks(list(ticks), labels=list(ticks.values()))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel(kl_label(numbers["metric_name"].iloc[0]))
    _ranks(ax, numbers)


def _lines(numbers: pd.DataFrame) -> Iterator[tuple[str, object, pd.DataFrame, str]]:
    for i, (cut, label) in enumerate(_LINES.items()):
        line = numbers[numbers["cut"] == cut]
        if len(line):
            yield colours.PALETTE[i], DASHES[i], line, label


def _ranks(ax: Axes, numbers: pd.DataFrame) -> None:
    ranks = sorted(numbers["rank"].unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, [str(rank) for rank in ranks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("rank of every module")
    ax.spines[["top", "right"]].set_visible(False)
