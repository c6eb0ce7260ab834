"""How decoupled the scales of MSPLoRA are, over the epochs."""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import combinations

import pandas as pd
from matplotlib.axes import Axes

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.updates import SCALES
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.lines import draw_lines, over_epochs, plot_lines
from msplora_analysis.show.drawing.plot import Plot, drawn, plots_of
from msplora_analysis.tables.prepared_pairs import prepare_pairs

QUANTITIES = ["overlap_in", "overlap_out", "cosine"]
PANELS = [f"{one} – {other}" for one, other in combinations(SCALES[:3], 2)]


def plot_decoupling_over_epochs(
    scales: pd.DataFrame,
    *,
    method: str | None = None,
    quantity: str = "overlap_in",
    labels: Mapping[str, str] | None = None,
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """Subspace overlap on either side and cosine over the epochs: a line for each two scales that act in one layer.

    Low means decoupled; the dotted line is what random subspaces would give. Computed for each layer and module, then
    averaged.

    Args:
        scales: Of `load_scale_pairs(details=True)`.
        method: With `ax`, the method to draw; None: the only one there is.
        quantity: With `ax`, "overlap_in", "overlap_out" or "cosine".
        labels: Method of each run (see `prepare_pairs`).
        ax: Where to draw one panel; None: a figure of all.
        style: The widths and letters of a venue.

    Returns:
        `ax`, or the figure.

    Raises:
        AnalysisError: The table is none of `load_scale_pairs`, or has no such method.

    Example:
        >>> ma.plot_decoupling_over_epochs(ma.load_scale_pairs("examples/runs", details=True))
    """
    prepared = prepare_pairs(scales, labels)
    table = numbers(prepared)
    if ax is None:
        return drawn(draw, prepared, table, style)
    if quantity not in QUANTITIES:
        raise AnalysisError(f"quantity={quantity!r}: expected {', '.join(QUANTITIES)}")
    return plot_lines(ax, table, method, quantity, order=PANELS, least=0.0)


@plots_of(plot_decoupling_over_epochs, order=9, needs="scales", name="decoupling_over_epochs")
def plots(scales: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    """scales: of `prepare_pairs`."""
    yield Plot("decoupling_over_epochs", numbers(scales), draw)


def numbers(scales: pd.DataFrame) -> pd.DataFrame:
    table = scales.assign(scale=scales["scale_i"] + " – " + scales["scale_j"])
    result = over_epochs(table, {name: table[name].to_numpy() for name in QUANTITIES}, PANELS)
    chances = table.assign(cosine=0.0).groupby(["variant", "scale"])[["chance_in", "chance_out", "cosine"]].mean()
    chances.columns = pd.Index(QUANTITIES, name="quantity")
    chance = chances.melt(value_name="chance", ignore_index=False).reset_index()
    return result.merge(chance, on=["variant", "scale", "quantity"], how="left")


draw = partial(
    draw_lines,
    heading="Between scales: low = decoupled, dotted = by chance",
    quantities=QUANTITIES,
    order=PANELS,
    least=0.0,
)
