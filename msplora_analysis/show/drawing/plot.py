"""A figure with its numbers and its name, and how both reach the disk."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pandas as pd

from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.style import settings
from msplora_analysis.show.drawing.venues import style_of
from msplora_analysis.tables.matrices import method_labels, slug
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
        csv = _whole_epochs(self.numbers).to_csv(index=False, lineterminator="\n").encode()
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


def each_method(
    name: str,
    table: pd.DataFrame,
    numbers: Callable[..., pd.DataFrame],
    draw: Callable[..., Figure],
    epoch: float | None,
) -> Iterator[Plot]:
    """A figure of the layers of every numbered stack and method, named by the stack only where there are several.

    `table` is what `prepare` or `prepare_pairs` makes; `numbers` takes the rows of layers in it, a method,
    a stack and the epoch, `draw` these numbers and a style.
    """
    layers = table[table["scale"] == "layer"]
    stacks = sorted(layers["stack"].dropna().unique())
    for stack in stacks:
        for method in method_labels(layers[layers["stack"] == stack]):
            stem = "_".join([name, slug(method), *([slug(stack)] if len(stacks) > 1 else [])])
            yield Plot(stem, numbers(layers, method, stack, epoch), partial(draw, name_stack=len(stacks) > 1))


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
