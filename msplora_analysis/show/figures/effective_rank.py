"""The effective rank over the epochs: how broad each spectrum is."""

from collections.abc import Iterator
from functools import partial

import pandas as pd

from msplora_analysis.compute.measures.metrics import effective_rank
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.lines import draw_lines, over_epochs
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.tables.matrices import prepare, sigma

QUANTITIES = ("effective_rank", "effective_rank_over_r")


def effective_rank_over_epochs(spectra: pd.DataFrame, *, style: str | None = None) -> Figure:
    """exp(−sum p ln p), from 1 to r, and its ratio to the rank r: rows; scales: columns; methods: lines.

    *High means broad*; the opposite of M_eff-k. Computed per matrix, then averaged.
    Source: Roy & Vetterli 2007, The effective rank (EUSIPCO).
    """
    return draw(numbers(prepare(spectra)), style)


@plots_of(effective_rank_over_epochs, order=5)
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    yield Plot("effective_rank_over_epochs", numbers(matrices), draw)


def numbers(matrices: pd.DataFrame) -> pd.DataFrame:
    rank = effective_rank(sigma(matrices))
    values = (rank, rank / matrices["rank"].to_numpy())
    return over_epochs(matrices, dict(zip(QUANTITIES, values, strict=True)))


draw = partial(draw_lines, heading="Effective rank: high = broad spectrum", quantities=QUANTITIES)
