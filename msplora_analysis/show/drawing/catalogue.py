"""Every kind of figure, as the file that draws it declares it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.plot import Plot

Plots = Callable[[pd.DataFrame, float | None], Iterator[Plot]]


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    Attributes:
        name: What its files are called, or what their names begin with.
        order: Its place among the others.
        needs: The table it is drawn of: "spectra", "pairs", "scales" or "comparison".
        plots: From that table, prepared, and an epoch or None: all figures of this kind that can be drawn.
        function: Draws one of them, for Python.
    """

    name: str
    order: int
    needs: str
    plots: Plots
    function: Callable[..., Figure]


KINDS: dict[str, Kind] = {}
"""Name -> kind, of all that were declared."""


def plots_of(
    function: Callable[..., Figure], *, order: int, needs: str = "spectra", name: str | None = None
) -> Callable[[Plots], Plots]:
    """Declare a kind of figure: a decorator of what yields a `Plot` for each figure of the kind that can be drawn.

    What is decorated gets the table that the kind needs, prepared, and an epoch or None.

    Args:
        function: Draws one of the figures, for Python.
        order: Its place among the others: files are written and listed in this order.
        needs: "spectra" (as `prepare` makes it), "pairs" or "scales" (as `prepare_pairs` makes them), or "comparison".
        name: What the names of its files begin with. Default: the name of the function.
    """

    def declare(plots: Plots) -> Plots:
        kind = Kind(name or function.__name__, order, needs, plots, function)
        KINDS[kind.name] = kind
        return plots

    return declare


def all_plots(tables: Mapping[str, pd.DataFrame], epoch: float | None = None) -> list[Plot]:
    """All figures that the tables allow, in order.

    Args:
        tables: What kinds of figures may need, prepared, by name (see `Kind.needs`).
        epoch: Of the figures of one checkpoint; None: see `tables.checkpoints.at_epoch`.
    """
    kinds = sorted(KINDS.values(), key=lambda kind: kind.order)
    return [plot for kind in kinds if kind.needs in tables for plot in kind.plots(tables[kind.needs], epoch)]
