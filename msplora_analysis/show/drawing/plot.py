"""A figure with its numbers and its name, how both reach the disk, and every kind of figure that a file declares."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pandas as pd

from msplora_analysis.errors import AnalysisError
from msplora_analysis.options import NO_MOMENTS
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.style import settings
from msplora_analysis.show.drawing.text import noting
from msplora_analysis.show.drawing.venues import style_of
from msplora_analysis.tables.files import marked
from msplora_analysis.tables.matrices import choose, method_labels, slug, stacks
from msplora_core.atomic import replacing

FORMATS = ("pdf", "png", "svg")

# The times and version numbers that matplotlib would put in, which would make equal figures unequal files.
_METADATA: dict[str, dict[str, str | None]] = {
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
}


@dataclass(frozen=True)
class Plot:
    """What one figure shows, under the name `stem`; without `draw`, a table alone."""

    stem: str
    numbers: pd.DataFrame
    draw: Callable[[pd.DataFrame, str | None], Figure] | None = None

    def write(self, folder: Path, formats: Sequence[str], style: str | None = None) -> list[Path]:
        """`stem`.<format> for each format and `stem`.csv, each complete or not there at all. Returns the paths."""
        csv = marked(_whole_epochs(self.numbers)).to_csv(index=False, lineterminator="\n").encode()
        paths = [_write(folder / f"{self.stem}.csv", lambda file: file.write(csv))]
        if self.draw and formats:
            figure = self.draw(self.numbers, style)
            with settings(style_of(style)):
                # One layout for all formats, rather than one for the resolution of each.
                figure.draw_without_rendering()
                figure.set_layout_engine("none")
                for name in formats:
                    save = partial(figure.savefig, format=name, metadata=_METADATA[name])
                    paths.append(_write(folder / f"{self.stem}.{name}", save))
        return paths


Plots = Callable[[pd.DataFrame, float | None], Iterator[Plot]]
_Plots = TypeVar("_Plots", bound=Plots)


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    Attributes:
        plots: From the table that it needs and an epoch or None: all figures of this kind that can be drawn.
        name, order, needs, function: See `plots_of`.
    """

    name: str
    order: int
    needs: str
    plots: Plots
    function: Callable[..., Any]


KINDS: dict[str, Kind] = {}
"""Name -> kind, of all that were declared."""


def plots_of(
    function: Callable[..., Any], *, order: int, needs: str = "spectra", name: str | None = None
) -> Callable[[_Plots], _Plots]:
    """Declare a kind of figure: a decorator of what yields a `Plot` for each figure of the kind that can be drawn.

    What is decorated gets the table that the kind needs, prepared, and an epoch or None.

    Args:
        function: Draws one of the figures, for Python.
        order: Its place among the others: files are written and listed in this order.
        needs: "spectra" (as `prepare` makes it), "pairs" or "scales" (as `prepare_pairs` makes them), "comparison"
            or "ablation" (of `compare` and `load_ablation`).
        name: What the names of its files begin with. Default: the name of the function.
    """

    def declare(plots: _Plots) -> _Plots:
        kind = Kind(name or function.__name__, order, needs, plots, function)
        KINDS[kind.name] = kind
        return plots

    return declare


def all_plots(tables: Mapping[str, pd.DataFrame], epoch: float | None = None) -> list[Plot]:
    """All figures that the tables allow, in order; one without numbers is none.

    Args:
        tables: What kinds of figures may need, prepared, by name (see `Kind.needs`).
        epoch: Of the figures of one checkpoint; None: see `tables.checkpoints.at_epoch`.
    """
    kinds = sorted(KINDS.values(), key=lambda kind: kind.order)
    plots = (plot for kind in kinds if kind.needs in tables for plot in kind.plots(tables[kind.needs], epoch))
    return [plot for plot in plots if len(plot.numbers)]


def weighted_plot(plot: Plot) -> Plot:
    """A figure of task-weighted spectra, under a name of its own: its title and the column of its numbers say so."""

    def draw(numbers: pd.DataFrame, style: str | None) -> Figure:
        assert plot.draw is not None
        return drawn(plot.draw, numbers.rename(columns={"task_sigma": "sigma"}), style, "moments")

    return Plot(f"{plot.stem}_task", plot.numbers.rename(columns={"sigma": "task_sigma"}), plot.draw and draw)


def drawn(draw: Callable[..., Figure], numbers: pd.DataFrame, style: str | None, weights: str, **more: Any) -> Figure:
    """What ``draw`` makes of the numbers; the title says if they are weighted."""
    if weights == NO_MOMENTS:
        return draw(numbers, style, **more)
    with noting("task-weighted"):
        return draw(numbers, style, **more)


def of_one_method(
    table: pd.DataFrame,
    method: str | None,
    stack: str | None,
    epoch: float | None,
    numbers: Callable[..., pd.DataFrame],
    draw: Callable[..., Figure],
    style: str | None,
    weights: str = NO_MOMENTS,
) -> Figure:
    """The figure of the layers of one method and stack; either may be left out if there is only one.

    Args:
        table: What `prepare` or `prepare_pairs` makes.
        numbers: Of the rows of layers in it, a method, a stack and the epoch.
        draw: Of these numbers and a style.
        weights: Whether the table is of task-weighted spectra.
    """
    layers = table[table["scale"] == "layer"]
    label = method and choose("method", method, method_labels(layers))
    stack = choose("stack", stack, stacks(layers[layers["variant"] == label] if label else layers))
    label = choose("method", label, method_labels(layers[layers["stack"] == stack]))
    name_stack = len(stacks(layers)) > 1
    return drawn(draw, numbers(layers, label, stack, epoch), style, weights, name_stack=name_stack)


def each_method(
    name: str,
    table: pd.DataFrame,
    numbers: Callable[..., pd.DataFrame],
    draw: Callable[..., Figure],
    epoch: float | None,
) -> Iterator[Plot]:
    """A figure as `of_one_method` draws it of every numbered stack and method, named by a stack only if of several."""
    layers = table[table["scale"] == "layer"]
    several = len(stacks(layers)) > 1
    for stack in stacks(layers):
        for method in method_labels(layers[layers["stack"] == stack]):
            stem = "_".join([name, slug(method), *([slug(stack)] if several else [])])
            yield Plot(stem, numbers(layers, method, stack, epoch), partial(draw, name_stack=several))


def check_formats(formats: Sequence[str]) -> list[str]:
    names = [name.removeprefix(".").lower() for name in formats]
    for given, name in zip(formats, names, strict=True):
        if name not in FORMATS:
            raise AnalysisError(f"unknown figure format {given!r}: choose from {', '.join(FORMATS)}")
    return list(dict.fromkeys(names))


def _whole_epochs(numbers: pd.DataFrame) -> pd.DataFrame:
    """Epochs as 20 rather than 20.0 where all are whole numbers."""
    epochs = [column for column in numbers.columns if column.startswith("epoch")]
    return numbers.astype({c: "Int64" for c in epochs if (numbers[c].dropna() % 1 == 0).all()})


def _write(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    with replacing(path) as beside, beside.open("wb") as file:
        write(file)
    return path
