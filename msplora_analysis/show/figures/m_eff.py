"""M_eff-k over the epochs: how much of each spectrum its largest values hold."""

from collections.abc import Iterator
from functools import partial

import pandas as pd

from msplora_analysis.compute.measures.metrics import KS, m_eff
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.lines import draw_lines, over_epochs
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.tables.matrices import prepare, sigma


def m_eff_over_epochs(spectra: pd.DataFrame, *, style: str | None = None) -> Figure:
    """M_eff-k = sum_{i≤k} sigma_i / sum_i sigma_i for k = 1, 2, 4: rows; scales: columns; methods: lines.

    *High means concentrated, that is low complexity*; the opposite of the effective rank. A part of rank k or less has
    M_eff-k = 1 by definition. Computed per matrix, then averaged. Source: MSPLoRA, arXiv 2503.21838, eq. 8.
    """
    return draw(numbers(prepare(spectra)), style)


@plots_of(m_eff_over_epochs, order=4)
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    yield Plot("m_eff_over_epochs", numbers(matrices), draw)


def numbers(matrices: pd.DataFrame) -> pd.DataFrame:
    spectra = sigma(matrices)
    return over_epochs(matrices, {f"m_eff_{k}": m_eff(spectra, k) for k in KS})


draw = partial(
    draw_lines,
    heading=r"$M_\mathrm{eff}$-k: high = concentrated, low complexity",
    quantities=[f"m_eff_{k}" for k in KS],
)
