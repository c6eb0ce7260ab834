"""Texts of a figure that find their room: broken into lines where they are too long, never cut off."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from msplora_analysis.errors import printable
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.tables.labels import epoch_note

_EDGE = 6.0  # points between a text and the edge of the figure, at least


_NOTES: ContextVar[tuple[str, ...]] = ContextVar("notes", default=())


@contextmanager
def noting(*notes: str) -> Iterator[None]:
    """Titles of figures drawn meanwhile say these first among their notes."""
    token = _NOTES.set((*_NOTES.get(), *filter(None, notes)))
    try:
        yield
    finally:
        _NOTES.reset(token)


def title(figure: Figure, heading: str, *notes: str, key: str = "", math: bool = False) -> None:
    """A short heading with what was averaged in brackets; on lines of their own where the figure is too narrow.

    Args:
        figure: The figure, which grows with each line.
        heading: What it shows.
        notes: What stands in the brackets; empty ones are left out.
        key: How to read it, on lines of its own.
        math: Whether $ begins a formula; else a $ in a name is a $.
    """
    heading, note = printable(heading), printable(", ".join(filter(None, (*_NOTES.get(), *notes))))
    room = 72 * figure.get_figwidth() - 2 * _EDGE
    text = figure.suptitle(f"{heading} ({note})" if note else heading, parse_math=math)
    lines = [text.get_text()]
    if size_of(text)[0] > room:
        lines = [_broken(text, part, room) for part in (heading, note) if part]
    lines += [_broken(text, printable(key), room)] if key else []
    text.set_text("\n".join(lines))
    _grow(figure, text.get_text().count("\n") * 1.2 * float(text.get_fontsize()))


def title_of_layers(
    figure: Figure,
    heading: str,
    numbers: pd.DataFrame,
    runs: list[int],
    *notes: str,
    name_stack: bool,
    key: str = "",
) -> None:
    """The title of a figure of layers at one checkpoint: the heading, then the stack, the epoch and how many runs.

    Args:
        figure: The figure.
        heading: What it shows.
        numbers: Its numbers, with the column `stack` and one or more columns `epoch...`.
        runs: The number of runs of each method.
        notes: What else stands in the brackets.
        name_stack: Whether to name the stack, as where a model has several.
        key: See `title`.
    """
    epochs = pd.concat([numbers[name] for name in numbers.columns if name.startswith("epoch")])
    stack = str(numbers["stack"].iloc[0]) if name_stack else ""
    title(figure, heading, stack, epoch_note(epochs), runs_note(runs), *notes, key=key)


def runs_note(counts: list[int]) -> str:
    """'1 run', 'mean over 9 runs', 'mean over 9 runs each', 'mean over 9 and 3 runs'."""
    each = " each" if len(counts) > 1 and len(set(counts)) == 1 else ""
    if max(counts) == 1:
        return f"1 run{each}"
    numbers = str(counts[0]) if each else " and ".join(str(count) for count in counts)
    return f"mean over {numbers} runs{each}"


def legend_below(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """A legend below all panels, in as many columns as fit; a name too long for one is broken."""
    room = 72 * figure.get_figwidth() - 2 * _EDGE
    # Of equal numbers of rows the fewest columns: 2 and 2 rather than 3 and 1.
    even = sorted({math.ceil(len(names) / rows) for rows in range(1, len(names) + 1)}, reverse=True)
    for columns in [columns for columns in even if columns <= 6]:
        legend = figure.legend(
            handles, names, loc="outside lower center", ncols=columns, handlelength=3, columnspacing=1.5
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        width, _ = size_of(legend)
        if width <= room:
            break
        if columns > 1:
            legend.remove()
    texts = legend.get_texts()
    widest = max(size_of(text)[0] for text in texts)
    for text in texts:
        break_text(text, room - (width - widest))
    _grow(figure, size_of(legend)[1] - 2.4 * float(texts[0].get_fontsize()))


def label_epochs(axes: Sequence[Axes], columns: int, epochs: Sequence[float]) -> None:
    """Epochs below panels of which `columns` stand side by side: each of them, or if there is no room some round ones.

    Args:
        axes: The panels.
        columns: How many stand side by side.
        epochs: What is drawn.
    """
    whole = [int(epoch) for epoch in epochs if epoch == int(epoch)]
    for ax in axes:
        ax.set_xlabel(LABELS["epoch"])
        figure = ax.get_figure(root=True)
        assert figure is not None
        points = 72 * (figure.get_figwidth() / columns - 0.6)
        labels = int(points / (5.5 * (len(f"{max(epochs, default=0):.0f}") + 1)))
        low, high = ax.get_xlim()
        if len(whole) == len(epochs) and whole and (high - low) / (min(np.diff(whole), default=1)) <= labels:
            ax.set_xticks(whole)
        else:
            ax.xaxis.set_major_locator(MaxNLocator(min(8, max(1, labels)), steps=[1, 2, 5, 10], integer=True))


def fit(figure: Figure) -> None:
    """Place the panels, and break labels of axes and titles of panels that are longer than what they name."""
    lay_out(figure)
    points = 72 / figure.dpi
    broken = False
    for ax in figure.axes:
        box = ax.get_window_extent()
        for text, room in ((ax.xaxis.label, box.width), (ax.yaxis.label, box.height), (ax.title, box.width)):
            broken |= break_text(text, points * room)
    if broken:
        lay_out(figure)


def thin_ticks(axes: Sequence[Axes]) -> None:
    """Fewer ticks across each panel, as long as their labels touch; call it once the panels have their places."""
    for ax in axes:
        for most in (3, 2, 1):
            boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
            gap = 0.4 * max((box.height for box in boxes), default=0)
            if all(one.x1 + gap <= other.x0 for one, other in pairwise(boxes)):
                break
            ax.locator_params(axis="x", nbins=most)


def lay_out(figure: Figure) -> None:
    """Place the panels as their labels are now."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    figure.placed = True
    for ax in figure.axes:
        ax.apply_aspect()


def break_text(text: Text, room: float) -> bool:
    """Break `text` into lines of at most `room` points, if it is longer along its direction. Returns whether it was."""
    content = text.get_text()
    if not content or _length(text) <= room:
        return False
    return _broken(text, content, room) != content


def broken(name: str, letters: int) -> str:
    """A name in lines of at most so many letters."""
    return "\n".join(textwrap.wrap(printable(name), letters, break_on_hyphens=False)) or " "


def size_of(artist: Text | Artist) -> tuple[float, float]:
    """Width and height in points."""
    figure = artist.get_figure(root=True)
    assert figure is not None
    box = artist.get_window_extent()
    return box.width * 72 / figure.dpi, box.height * 72 / figure.dpi


def _grow(figure: Figure, points: float) -> None:
    figure.set_figheight(figure.get_figheight() + max(0, points) / 72)


def _length(text: Text) -> float:
    width, height = size_of(text)
    return height if text.get_rotation() == 90 else width


def _broken(text: Text, content: str, room: float) -> str:
    """`content` with line ends, so that `text` is no longer than `room` points; formulas stay whole."""
    # Words of labels with a formula are short; a formula cut in two would be an error.
    long = not (text.get_parse_math() and "$" in content)
    wrap = partial(textwrap.wrap, content, break_on_hyphens=False, break_long_words=long)
    letters = len(content)
    text.set_text(content)
    while (length := _length(text)) > room and letters > 4:
        letters = max(4, min(letters - 1, int(letters * room / length)))
        text.set_text("\n".join(wrap(letters)))
    lines = len(wrap(letters))
    while letters > 4 and len(wrap(letters - 1)) == lines:  # lines of about one length
        letters -= 1
    text.set_text("\n".join(wrap(letters)))
    return text.get_text()
