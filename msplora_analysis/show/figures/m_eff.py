"""M_eff-k over the epochs: how much of each spectrum its largest values hold."""

from collections.abc import Iterator
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from msplora_analysis.compute.measures.metrics import KS, m_eff
from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.lines import draw_lines, over_epochs, plot_lines
from msplora_analysis.show.drawing.plot import Plot, drawn, plots_of
from msplora_analysis.tables.matrices import prepare, sigma


def plot_m_eff_over_epochs(
    spectra: pd.DataFrame,
    *,
    method: str | None = None,
    k: int = 1,
    ax: Axes | None = None,
    style: str | None = None,
) -> Axes | Figure:
    """M_eff-k = sum_{i≤k} sigma_i / sum_i sigma_i for k = 1, 2, 4 over the epochs: a line for each scale.

    *High means concentrated, that is low complexity*; the opposite of the effective rank. A part of rank k or less has
    M_eff-k = 1 by definition. Computed per matrix, then averaged. Source: MSPLoRA, arXiv 2503.21838, eq. 8.

    Args:
        spectra: Of `load_spectra`.
        method: With `ax`, the method whose scales to draw; None: the only one there is.
        k: With `ax`, 1, 2 or 4.
        ax: Where to draw one panel; None: a figure of all.
        style: The widths and letters of a venue.

    Returns:
        `ax`, or the figure.

    Raises:
        AnalysisError: The table is none of `load_spectra`, or has no such method.

    Example:
        >>> ma.plot_m_eff_over_epochs(ma.load_spectra("examples/runs"))
    """
    matrices = prepare(spectra)
    table = numbers(matrices)
    if ax is None:
        return drawn(draw, matrices, table, style)
    if k not in KS:
        raise AnalysisError(f"k={k}: expected {', '.join(map(str, KS))}")
    return plot_lines(ax, table, method, f"m_eff_{k}")


@plots_of(plot_m_eff_over_epochs, order=4, name="m_eff_over_epochs")
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
