"""What any two layers share, beside how far their spectra lie apart: the same pairs, seen two ways."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, each_method, of_one_method, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables import layer_kl
from msplora_analysis.tables.checkpoints import at_epoch
from msplora_analysis.tables.prepared_pairs import prepare_pairs

PANELS = {"kl": "KL of the spectra"} | {side: LABELS[side] for side in ("overlap_in", "overlap_out")}
CHANCES = ["chance_in", "chance_out"]
_ALIKE = 0.995  # overlaps from here on are 1 to the eye: the colour bar then ends at 1


def overlap_between_layers(
    pairs: pd.DataFrame,
    method: str | None = None,
    *,
    stack: str | None = None,
    epoch: float | None = None,
    labels: Mapping[str, str] | None = None,
    style: str | None = None,
) -> Figure:
    """Three squares, layer i down and layer j across: KL(i‖j) of the spectra, subspace overlap on either side.

    Of the `layer` parts; means over modules and runs of the measures of each pair. The mark on the colour bar of the
    overlaps is what random subspaces would give; there are two where the sides differ in size. Source of the
    overlap: Hu et al. 2021, arXiv 2106.09685.

    Args:
        pairs: Of `load_pairs`.
        labels: Method of each run (see `prepare_pairs`).
    """
    return of_one_method(prepare_pairs(pairs, labels), method, stack, epoch, numbers, draw, style)


@plots_of(overlap_between_layers, order=8, needs="pairs")
def plots(pairs: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    """pairs: of `prepare_pairs`."""
    return each_method("overlap_between_layers", pairs, numbers, draw, epoch)


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
def draw(numbers: pd.DataFrame, style: Style, *, name_stack: bool = False) -> Figure:
    layers = sorted(numbers["layer_i"].unique())
    figure, axes = heatmap.square_panels(style, layers, len(PANELS))
    overlaps = numbers[["overlap_in", "overlap_out"]].to_numpy()
    chances = numbers[CHANCES].mean()
    for ax, (column, name) in zip(axes, PANELS.items(), strict=True):
        largest = numbers["kl"].max() if column == "kl" else max(np.nanmax(overlaps, initial=0), 1.5 * chances.max())
        cmap = colours.SEQUENTIAL if column == "kl" else colours.OVERLAPS
        norm = heatmap.colour_scale(1 if column != "kl" and largest > _ALIKE else largest)
        cells = heatmap.draw_cells(ax, layer_kl.matrix(numbers, column), norm, cmap)
        ax.set_title(name)
        if column != "overlap_in":  # both overlaps share a bar
            of = axes[:1] if column == "kl" else axes[1:]
            label = LABELS["kl" if column == "kl" else "overlap"]
            bar = figure.colorbar(cells, ax=of, label=label, aspect=25, pad=0.02)
    for chance in chances.dropna().unique():
        bar.ax.axhline(chance, color="white", linewidth=2)
        bar.ax.axhline(chance, color="black", linewidth=0.8)
    by_chance = [f"{chance:.2g} {side}" for chance, side in zip(chances, ("in", "out"), strict=True)]
    if np.isclose(*chances):
        by_chance = [f"{chances.iloc[0]:.2g}"]
    heading = f"{numbers['variant'].iloc[0]}: what layers share"
    marks = f"mark{'s' * (len(by_chance) - 1)}: by chance, {', '.join(by_chance)}"
    text.title_of_layers(figure, heading, numbers, [numbers["runs"].iloc[0]], marks, name_stack=name_stack)
    heatmap.finish_squares(figure, axes, layers)
    return figure
