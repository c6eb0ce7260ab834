"""The effective rank over the epochs: how broad each spectrum is."""

from collections.abc import Iterator
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from msplora_analysis.compute.measures.metrics import effective_rank
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.lines import draw_lines, over_epochs, plot_lines
from msplora_analysis.show.drawing.plot import Plot, drawn, plots_of
from msplora_analysis.tables.matrices import prepare, sigma

QUANTITIES = ("effective_rank", "effective_rank_over_r")


def plot_effective_rank_over_epochs(
    spectra: pd.DataFrame,
    *,
    method: str | None = None,
    relative: bool = False,
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """exp(−sum p ln p), from 1 to r, and its ratio to the rank r, over the epochs: a line for each scale.

    *High means broad*; the opposite of M_eff-k. Computed per matrix, then averaged.
    Source: Roy & Vetterli 2007, The effective rank (EUSIPCO).

    Args:
        spectra: Of `load_spectra`.
        method: With `ax`, the method whose scales to draw; None: the only one there is.
        relative: With `ax`, draw the ratio to the rank.
        ax: Where to draw one panel; None: a figure of all.
        style: The widths and letters of a venue.

    Returns:
        `ax`, or the figure.

    Raises:
        AnalysisError: The table is none of `load_spectra`, or has no such method.

    Example:
        >>> ma.plot_effective_rank_over_epochs(ma.load_spectra("examples/runs"))
    """
    matrices = prepare(spectra)
    table = numbers(matrices)
    if ax is None:
        return drawn(draw, matrices, table, style)
    return plot_lines(ax, table, method, QUANTITIES[relative])


@plots_of(plot_effective_rank_over_epochs, order=5, name="effective_rank_over_epochs")
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    yield Plot("effective_rank_over_epochs", numbers(matrices), draw)


def numbers(matrices: pd.DataFrame) -> pd.DataFrame:
    rank = effective_rank(sigma(matrices))
    values = (rank, rank / matrices["rank"].to_numpy())
    return over_epochs(matrices, dict(zip(QUANTITIES, values, strict=True)))


draw = partial(draw_lines, heading="Effective rank: high = broad spectrum", quantities=QUANTITIES)
