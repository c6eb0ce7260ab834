"""Figure 3: the singular values of the global, mid and layer parts over the epochs of training."""

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize

from msplora_analysis.compute.measures.metrics import Array
from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.updates import SCALES
from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, drawn, plots_of, weights_note
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.show.figures.effective_rank import numbers as effective_ranks
from msplora_analysis.tables.checkpoints import epochs_of
from msplora_analysis.tables.matrices import choose, is_msplora, ks, method_labels, prepare, slug, weighted

TOP = 8
_COLOURS = ("log", "linear")


def plot_figure3(
    spectra: pd.DataFrame,
    *,
    method: str | None = None,
    scale: str | None = None,
    relative: bool = False,
    colour: str = "log",
    weights: str = "none",
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """The singular values of each scale of MSPLoRA over the epochs, below them their ratios to the first.

    Epochs across, index k down (1 at the top). A panel with many bright rows is a broad spectrum, that is a high
    effective rank, which its title says of the last epoch; M_eff-k, the share of the k largest values, is then low.
    Source: MSPLoRA, arXiv 2503.21838, figure 3 (sigma_k alone, linear colours, ranks 8/8/8).

    Args:
        spectra: Of `load_spectra`.
        method: Its label, such as "MSPLoRA 8/8/8"; None: the only one there is.
        scale: With `ax`, the scale to draw: "global", "mid" or "layer".
        relative: With `ax`, draw sigma_k / sigma_1.
        colour: "log", or "linear" as in the paper, which has no ratios.
        weights: "moments": of the task-weighted spectra, `task_sigma`.
        ax: Where to draw one panel; None: a figure of all.
        style: The widths and letters of a venue, such as "icml-column".

    Returns:
        `ax`, or the figure.

    Raises:
        AnalysisError: The table has no such method or scale, or checkpoints of one epoch alone.

    Example:
        >>> ma.plot_figure3(ma.load_spectra("examples/runs"), colour="linear").savefig("figure3.pdf")
    """
    if colour not in _COLOURS:
        raise AnalysisError(f"colour={colour!r}: expected {' or '.join(_COLOURS)}")
    matrices = prepare(weighted(spectra, weights))
    method = choose("method", method, drawable(matrices))
    table = numbers(matrices, method)
    if ax is None:
        painted = partial(draw, colour=colour, breadths=breadths(matrices, method))
        return drawn(painted, matrices, table, style, weights_note(weights))
    part = table[table["scale"] == choose("scale", scale, list(table["scale"].unique()))]
    values = _relative(part) if relative else part["sigma"].to_numpy(np.float64)
    cells = _panel(ax, part.assign(shown=values), _norm(values, colour), int(part["k"].max()))
    heatmap.colour_bar(cells, ax, LABELS["relative" if relative else "sigma"])
    ax.set(xlabel=LABELS["epoch"], ylabel=LABELS["k"])
    return ax


@plots_of(plot_figure3, order=1, name="figure3")
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    for method in drawable(matrices):
        painted = partial(draw, breadths=breadths(matrices, method))
        yield Plot(f"figure3_{slug(method)}", numbers(matrices, method), painted, method)


def drawable(matrices: pd.DataFrame) -> list[str]:
    """Labels of MSPLoRA with at least two epochs."""
    ours = filter(is_msplora, method_labels(matrices))
    return [label for label in ours if len(epochs_of(matrices[matrices["variant"] == label])) > 1]


def numbers(matrices: pd.DataFrame, method: str) -> pd.DataFrame:
    """Mean sigma_k over groups, modules and runs. One row per scale, epoch and k ≤ min(rank, 8)."""
    parts = matrices[(matrices["variant"] == method) & (matrices["scale"] != "total")]
    by = parts.groupby(["scale", "epoch"])
    means = by[ks(parts)[:TOP]].mean().melt(var_name="k", value_name="sigma", ignore_index=False).reset_index()
    counts = by.agg(rank=("rank", "max"), runs=("run", "nunique"), matrices=("name", "size")).reset_index()
    table = means.merge(counts, on=["scale", "epoch"])
    table = table[table["k"] <= table["rank"]].astype({"k": int})
    table["scale"] = pd.Categorical(table["scale"], SCALES[:3])
    table = table.sort_values(["scale", "epoch", "k"], ignore_index=True).astype({"scale": str})
    table.insert(0, "variant", method)
    return table[["variant", "scale", "epoch", "k", "sigma", "rank", "runs", "matrices"]]


def breadths(matrices: pd.DataFrame, method: str) -> dict[str, float]:
    """Scale → its effective rank at the last epoch, as the figure of effective ranks has it."""
    table = effective_ranks(matrices[matrices["variant"] == method])
    last = table[(table["quantity"] == "effective_rank") & (table["epoch"] == table["epoch"].max())]
    return dict(zip(last["scale"], last["mean"], strict=True))


@styled
def draw(
    numbers: pd.DataFrame, style: Style, *, colour: str = "log", breadths: Mapping[str, float] | None = None
) -> Figure:
    scales = list(numbers["scale"].unique())
    numbers = numbers.assign(relative=_relative(numbers))
    shown = ["sigma", "relative"] if colour == "log" else ["sigma"]
    abreast = style.widest >= heatmap.NARROW
    rows, columns = (len(shown), len(scales)) if abreast else (len(scales), len(shown))
    height = 0.8 + 1.5 * rows if abreast else 1.5 + 1.3 * rows
    figure = Figure(figsize=(style.widest, height), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = axes if abreast else axes.T  # by quantity and scale
    last = int(numbers["k"].max())
    for row, quantity in zip(panels, shown, strict=True):
        norm = _norm(numbers[quantity].to_numpy(np.float64), colour)
        for ax, scale in zip(row, scales, strict=True):
            part = numbers[numbers["scale"] == scale]
            cells = _panel(ax, part.assign(shown=part[quantity]), norm, last)
            if ax in panels[0]:
                breadth = (breadths or {}).get(scale, np.nan)
                said = f"\neffective rank {breadth:.1f}" if np.isfinite(breadth) else ""
                ax.set_title(f"{scale} (rank {part['rank'].max()}){said}")
        where = {"aspect": 12, "pad": 0.015} if abreast else {"location": "bottom", "aspect": 12, "pad": 0.02}
        heatmap.colour_bar(cells, row.tolist(), LABELS[quantity], **where)
    for ax in axes[:, 0]:
        ax.set_ylabel(LABELS["k"])
    text.label_epochs(axes[-1].tolist(), columns, _learned(numbers))
    heading = f"{numbers['variant'].iloc[0]}: singular values over training"
    text.title(figure, heading, text.runs_note([int(numbers["runs"].max())]))
    text.fit(figure)
    return figure


def _panel(ax: Axes, part: pd.DataFrame, norm: Normalize, last: int) -> QuadMesh:
    """The cells of one scale, of the column `shown`, down to index `last`."""
    values = part[part["epoch"].isin(_learned(part))].pivot(index="k", columns="epoch", values="shown")
    x_edges = _midpoints(values.columns.to_numpy(dtype=float))
    cells = heatmap.draw_cells(ax, values.to_numpy(), norm, colours.SEQUENTIAL, x_edges=x_edges, first_row=1)
    ax.set(ylim=(last + 0.5, 0.5), yticks=range(1, last + 1))
    if len(values) < last:
        heatmap.mark_absent(ax, x_edges, len(values) + 0.5, last + 0.5, f"rank {len(values)}")
    return cells


def _relative(numbers: pd.DataFrame) -> Array:
    first = numbers.groupby(["scale", "epoch"])["sigma"].transform("max")
    return (numbers["sigma"] / first.where(first > 0)).to_numpy(np.float64)


def _norm(values: Array, colour: str) -> Normalize:
    return heatmap.log_scale(values) if colour == "log" else heatmap.colour_scale(float(np.nanmax(values, initial=0)))


def _learned(numbers: pd.DataFrame) -> list[float]:
    """The epochs at which anything was learned: before training all B are zero. All, if nothing ever was."""
    known = numbers.loc[numbers["sigma"] > 0, "epoch"]
    return sorted(set(known if len(known) else numbers["epoch"]))


def _midpoints(centres: Array) -> Array:
    """Edges half-way between the epochs; a scale may have one alone."""
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
