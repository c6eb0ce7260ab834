"""What any two layers share, beside how far their spectra lie apart: the same pairs, seen two ways."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize

from msplora_analysis.compute.measures.metrics import Array
from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, drawn, each_method, one_method, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables import layer_kl
from msplora_analysis.tables.checkpoints import at_epoch
from msplora_analysis.tables.matrices import stacks
from msplora_analysis.tables.prepared_pairs import prepare_pairs

PANELS = {"kl": "KL of the spectra, mean over modules"} | {s: LABELS[s] for s in ("overlap_in", "overlap_out")}
CHANCES = ["chance_in", "chance_out"]
_BAND = 2.0  # standard deviations of chance


def plot_overlap_between_layers(
    pairs: pd.DataFrame,
    *,
    method: str | None = None,
    stack: str | None = None,
    epoch: float | None = None,
    quantity: str = "overlap_in",
    labels: Mapping[str, str] | None = None,
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """Three squares, layer i down and layer j across: KL(i‖j) of the spectra, subspace overlap on either side.

    Of the `layer` parts; means over modules and runs of the measures of each pair: `plot_kl_between_layers` averages
    the spectra first. From the overlaps that of random subspaces is taken away: red is above chance, blue below; what
    lies within two standard deviations of it is grey. Source of the overlap: Hu et al. 2021, arXiv 2106.09685.

    Args:
        pairs: Of `load_pairs(details=True)`; without details, nothing is grey.
        method: Its label; None: the only one there is.
        stack: Of numbered layers; None: the only one there is.
        epoch: None: the last that all runs share.
        quantity: With `ax`, "kl", "overlap_in" or "overlap_out".
        labels: Method of each run (see `prepare_pairs`).
        ax: Where to draw one square; None: a figure of the three.
        style: The widths and letters of a venue.

    Returns:
        `ax`, or the figure.

    Raises:
        AnalysisError: The table has no such method, stack or epoch.

    Example:
        >>> ma.plot_overlap_between_layers(ma.load_pairs("examples/runs/lora-8", details=True))
    """
    layers, method, stack = one_method(prepare_pairs(pairs, labels), method, stack)
    table = numbers(layers, method, stack, epoch)
    bands_ = bands(layers, method, stack, epoch)
    if ax is None:
        painted = partial(draw, bands=bands_, name_stack=len(stacks(layers)) > 1)
        return drawn(painted, layers[layers["variant"] == method], table, style)
    if quantity not in PANELS:
        raise AnalysisError(f"quantity={quantity!r}: expected {', '.join(PANELS)}")
    cells = _panel(ax, table, quantity, bands_, _norm(table, [quantity]))
    heatmap.colour_bar(cells, ax, LABELS["kl" if quantity == "kl" else "excess"])
    numbered = sorted(table["layer_i"].unique())
    heatmap.tick_layers(ax.xaxis, numbered)
    heatmap.tick_layers(ax.yaxis, numbered)
    ax.set(xlabel=LABELS["layer_j"], ylabel=LABELS["layer_i"], aspect="equal", title=PANELS[quantity])
    return ax


@plots_of(plot_overlap_between_layers, order=8, needs="pairs", name="overlap_between_layers")
def plots(pairs: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    """pairs: of `prepare_pairs`."""
    layers = pairs[pairs["scale"] == "layer"]
    for plot in each_method("overlap_between_layers", pairs, numbers, draw, epoch):
        first = plot.numbers.iloc[0] if len(plot.numbers) else None
        known = None if first is None else bands(layers, first["variant"], first["stack"], epoch)
        yield replace(plot, draw=partial(plot.draw, bands=known)) if plot.draw else plot


def bands(layers: pd.DataFrame, method: str, stack: str, epoch: float | None = None) -> dict[str, float]:
    """How far a mean of overlaps of random subspaces may lie from its expectation: two standard deviations.

    Pairs of layers are means over as many modules and runs; without details, it is not known.
    """
    table = at_epoch(layers[(layers["variant"] == method) & (layers["stack"] == stack)], epoch)
    if not {"deviation_in", "deviation_out"} <= set(table.columns):
        return {}
    found = {}
    for side in ("in", "out"):
        squares = table.assign(square=table[f"deviation_{side}"].astype("float64") ** 2)
        of_pairs = squares.groupby(["group_i", "group_j"])["square"].agg(["sum", "size"])
        found[f"overlap_{side}"] = _BAND * float((np.sqrt(of_pairs["sum"]) / of_pairs["size"]).median())
    return {name: band for name, band in found.items() if np.isfinite(band)}


def numbers(layers: pd.DataFrame, method: str, stack: str, epoch: float | None = None) -> pd.DataFrame:
    """One row per ordered pair of layers: means over modules and runs, leaving out updates of zero."""
    table = at_epoch(layers[(layers["variant"] == method) & (layers["stack"] == stack)], epoch)
    forth = table.rename(columns={"group_i": "layer_i", "group_j": "layer_j", "kl_ij": "kl"})
    back = table.rename(columns={"group_j": "layer_i", "group_i": "layer_j", "kl_ji": "kl"})
    both = pd.concat([forth, back])
    means = both.groupby(["layer_i", "layer_j"])[[*PANELS, *CHANCES, "cosine"]].mean().reset_index()
    about = {"variant": method, "stack": stack, "epoch": table["epoch"].iloc[0], "runs": table["run"].nunique()}
    return pd.DataFrame(about, index=means.index).join(means.astype({"layer_i": int, "layer_j": int}))


@styled
def draw(
    numbers: pd.DataFrame, style: Style, *, bands: Mapping[str, float] | None = None, name_stack: bool = False
) -> Figure:
    layers = sorted(numbers["layer_i"].unique())
    figure, axes = heatmap.square_panels(style, layers, len(PANELS))
    of_overlaps = _norm(numbers, ["overlap_in", "overlap_out"])
    for ax, (column, name) in zip(axes, PANELS.items(), strict=True):
        cells = _panel(ax, numbers, column, bands or {}, _norm(numbers, ["kl"]) if column == "kl" else of_overlaps)
        ax.set_title(name)
        if column != "overlap_in":  # both overlaps share a bar
            of = axes[:1] if column == "kl" else axes[1:]
            heatmap.colour_bar(cells, of, LABELS["kl" if column == "kl" else "excess"], aspect=25, pad=0.02)
    chances = numbers[CHANCES].mean()
    by_chance = [f"{chance:.2g} {side}" for chance, side in zip(chances, ("in", "out"), strict=True)]
    if np.isclose(*chances):
        by_chance = [f"{chances.iloc[0]:.2g}"]
    heading = f"{numbers['variant'].iloc[0]}: what layers share"
    key = f"red: more than by chance ({', '.join(by_chance)}), blue: less" + ("; grey: chance alone" if bands else "")
    text.title_of_layers(figure, heading, numbers, [numbers["runs"].iloc[0]], name_stack=name_stack, key=key)
    heatmap.finish_squares(figure, axes, layers)
    return figure


def _shown(numbers: pd.DataFrame, column: str) -> Array:
    """The values of a square: KL, or an overlap less that of chance."""
    values = layer_kl.matrix(numbers, column)
    return values if column == "kl" else values - layer_kl.matrix(numbers, column.replace("overlap", "chance"))


def _norm(numbers: pd.DataFrame, columns: Sequence[str]) -> Normalize:
    largest = float(np.nanmax([np.abs(_shown(numbers, column)) for column in columns], initial=0)) or 1
    return heatmap.colour_scale(largest, 0 if columns == ["kl"] else -largest)


def _panel(ax: Axes, numbers: pd.DataFrame, column: str, bands: Mapping[str, float], norm: Normalize) -> QuadMesh:
    values = _shown(numbers, column)
    if column == "kl":
        return heatmap.draw_cells(ax, values, norm, colours.SEQUENTIAL)
    by_chance = np.abs(values) <= bands.get(column, 0)
    heatmap.draw_cells(ax, np.where(by_chance, 0.0, np.nan), norm, colours.GREY)
    return heatmap.draw_cells(ax, np.where(by_chance, np.nan, values), norm, colours.DIVERGING, empty="white")
