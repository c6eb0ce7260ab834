"""A figure with its numbers and its name, how both reach the disk, and every kind of figure that a file declares."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import matplotlib as mpl
import pandas as pd
from matplotlib.backend_bases import get_registered_canvas_class

from msplora_analysis.ask.comparison.pairing import units
from msplora_analysis.errors import AnalysisError
from msplora_analysis.options import NO_MOMENTS
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.style import lean_fonts, settings
from msplora_analysis.show.drawing.text import lay_out, noting
from msplora_analysis.show.drawing.venues import style_of
from msplora_analysis.tables.files import marked
from msplora_analysis.tables.matrices import choose, method_labels, slug, stacks
from msplora_core.atomic import replacing

FORMATS = ("pdf", "png", "svg")
_NAMED = 4  # runs or tasks, at most, in a title

# The times and version numbers that matplotlib would put in, which would make equal figures unequal files.
_METADATA: dict[str, dict[str, str | None]] = {
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
}


@dataclass(frozen=True)
class Plot:
    """What one figure shows; without `draw`, a table alone.

    Attributes:
        stem: The name of its files.
        numbers: What is drawn, and written beside it.
        draw: Of the numbers and a style.
        of: Which one of its kind, in words: a method, or two.
        kind: What kind of figure, as `all_plots` says.
        notes: What its title must say beside what `draw` says.
    """

    stem: str
    numbers: pd.DataFrame
    draw: Callable[..., Figure] | None = None
    of: str = ""
    kind: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What Python calls it: "figure3: MSPLoRA 8/8/8"."""
        return f"{self.kind}: {self.of}" if self.of else self.kind or self.stem

    @property
    def csv(self) -> bytes:
        """The numbers, as they are written."""
        return marked(_whole_epochs(self.numbers)).to_csv(index=False, lineterminator="\n").encode()

    def figure(self, style: str | None = None) -> Figure:
        assert self.draw is not None
        numbers = self.numbers.rename(columns={"task_sigma": "sigma"})
        with noting(*self.notes):
            return self.draw(numbers, style)

    def write(self, folder: Path, formats: Sequence[str], style: str | None = None) -> list[Path]:
        """`stem`.<format> for each format and `stem`.csv, each complete or not there at all. Returns the paths."""
        paths = [_write(folder / f"{self.stem}.csv", lambda file: file.write(self.csv))]
        if self.draw and formats:
            figure = self.figure(style)
            with settings(style_of(style)), lean_fonts():
                # One layout for all formats, rather than one for the resolution of each; savefig would draw each twice.
                if not figure.placed:
                    lay_out(figure)
                figure.set_layout_engine("none")
                for name in formats:
                    canvas = get_registered_canvas_class(name)(figure)
                    figure.set_dpi(mpl.rcParams["savefig.dpi"])
                    save = partial(getattr(canvas, f"print_{name}"), metadata=_METADATA[name])
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


def all_plots(
    tables: Mapping[str, pd.DataFrame], epoch: float | None = None, *, kinds: Sequence[str] | None = None
) -> list[Plot]:
    """All figures that the tables allow, in order; one without numbers is none.

    Args:
        tables: What kinds of figures may need, prepared, by name (see `Kind.needs`).
        epoch: Of the figures of one checkpoint; None: see `tables.checkpoints.at_epoch`.
        kinds: Only these; None: all.
    """
    plots = []
    for kind in sorted(KINDS.values(), key=lambda kind: kind.order):
        if kind.needs in tables and (kinds is None or kind.name in kinds):
            note = runs_named(tables[kind.needs])
            for plot in kind.plots(tables[kind.needs], epoch):
                if len(plot.numbers):
                    # Tables alone have names of their own.
                    plots.append(replace(plot, kind=kind.name if plot.draw else "", notes=(*plot.notes, note)))
    return plots


def weighted_plot(plot: Plot) -> Plot:
    """A figure of task-weighted spectra, under a name of its own: its title and the column of its numbers say so."""
    numbers = plot.numbers.rename(columns={"sigma": "task_sigma"})
    kind, notes = plot.kind and f"{plot.kind}_task", ("task-weighted", *plot.notes)
    return replace(plot, stem=f"{plot.stem}_task", kind=kind, numbers=numbers, notes=notes)


def runs_named(table: pd.DataFrame) -> str:
    """What the runs are of which a figure shows means: their tasks, or where these are not known their names."""
    if not {"run", "variant"} <= set(table.columns) or table.groupby("variant")["run"].nunique().max() < 2:
        return ""
    tasks = [unit.task for unit in units(table["run"].unique())]
    names = [str(name) for name in (tasks if None not in tasks else table["run"].unique())]
    names = list(dict.fromkeys(names))
    return ", ".join(names if len(names) <= _NAMED else [*names[: _NAMED - 1], "…", names[-1]])


def drawn(
    draw: Callable[..., Figure], table: pd.DataFrame, numbers: pd.DataFrame, style: str | None, *notes: str
) -> Figure:
    """What ``draw`` makes of the numbers; the title says what the runs of the table are, and the notes."""
    with noting(*notes, runs_named(table)):
        return draw(numbers, style)


def weights_note(weights: str) -> str:
    """What titles say of the spectra."""
    return "" if weights == NO_MOMENTS else "task-weighted"


def one_method(table: pd.DataFrame, method: str | None, stack: str | None) -> tuple[pd.DataFrame, str, str]:
    """The rows of layers, and the method and stack to draw; either may be left out if there is only one.

    Args:
        table: What `prepare` or `prepare_pairs` makes.
        method: Its label.
        stack: The dotted path of the numbered layers.
    """
    layers = table[table["scale"] == "layer"]
    label = method and choose("method", method, method_labels(layers))
    stack = choose("stack", stack, stacks(layers[layers["variant"] == label] if label else layers))
    label = choose("method", label, method_labels(layers[layers["stack"] == stack]))
    return layers, label, stack


def each_method(
    name: str,
    table: pd.DataFrame,
    numbers: Callable[..., pd.DataFrame],
    draw: Callable[..., Figure],
    epoch: float | None,
) -> Iterator[Plot]:
    """A figure of every numbered stack and method, named by a stack only if of several.

    Args:
        name: What the names of its files begin with.
        table: What `prepare` or `prepare_pairs` makes.
        numbers: Of the rows of layers in it, a method, a stack and the epoch.
        draw: Of these numbers and a style.
        epoch: See `all_plots`.
    """
    layers = table[table["scale"] == "layer"]
    several = len(stacks(layers)) > 1
    for stack in stacks(layers):
        for method in method_labels(layers[layers["stack"] == stack]):
            stem = "_".join([name, slug(method), *([slug(stack)] if several else [])])
            of = f"{method}, {stack}" if several else method
            yield Plot(stem, numbers(layers, method, stack, epoch), partial(draw, name_stack=several), of)


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
