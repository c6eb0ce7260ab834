"""How decoupled the scales of MSPLoRA are, over the epochs."""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import combinations

import pandas as pd

from msplora_analysis.formats.updates import SCALES
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.lines import draw_lines, over_epochs
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.tables.prepared_pairs import prepare_pairs

QUANTITIES = ["overlap_in", "overlap_out", "cosine"]
PANELS = [f"{one} – {other}" for one, other in combinations(SCALES[:3], 2)]


def decoupling_over_epochs(
    scales: pd.DataFrame, *, labels: Mapping[str, str] | None = None, style: str | None = None
) -> Figure:
    """Subspace overlap on either side and cosine: rows; two scales of one layer: columns; methods: lines.

    Low means decoupled; the dotted line is what random subspaces would give. Computed for each layer and module, then
    averaged.

    Args:
        scales: Of `load_scale_pairs`.
        labels: Method of each run (see `prepare_pairs`).
    """
    return draw(numbers(prepare_pairs(scales, labels)), style)


@plots_of(decoupling_over_epochs, order=9, needs="scales")
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
