"""What the terminal shows: progress, tables, paths; and what ends a command early: Ctrl-C, a reader that leaves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import typer

from msplora_analysis.errors import AnalysisError, printable

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from rich.console import Console

    from msplora_analysis.options import Progress

_COLUMNS = {
    "sigma_1": "sigma_1",
    "effective\nrank": "effective_rank",
    "stable\nrank": "stable_rank",
    "M_eff-1": "m_eff_1",
    "M_eff-4": "m_eff_4",
}
# With moments; together they fit into 80 letters.
_TASK_COLUMNS = {name: column for name, column in _COLUMNS.items() if column not in ("stable_rank", "m_eff_4")} | {
    "task\nnorm": "task_norm",
    "task eff.\nrank": "task_effective_rank",
}


_MOST_RUNS = 20  # in a summary
_LEAST = 20  # letters of a table's names, however narrow the terminal is

_Checkpoint: TypeAlias = "tuple[int | None, float | None]"  # step and epoch
_T = TypeVar("_T")


@contextmanager
def progress_bar(what: str, things: str = "adapters") -> Iterator[Progress | None]:
    """A bar on standard error with rate and remaining time, if a person is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, count="", rate="")

        def show(done: float, total: int) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:.3g}/s" if speed else ""
            bar.update(task, completed=done, total=total, count=f"{int(done)} of {total} {things}", rate=rate)

        yield show


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C only makes the function given true, so that what is done can be kept."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, before)  # a second one ends at once

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)


def end_cleanly() -> None:
    """Have a scheduler's signal, or a closed terminal, end the program as an exception does: nothing stays behind."""

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, end)


@contextmanager
def closed_pipe_ignored() -> Iterator[None]:
    """The files are written: that nobody reads the rest of the output (`| head`) is no failure."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: object) -> None:
    """Print one line; what a terminal would act on in it is written as escapes."""
    print(printable(str(text)))


def print_paths(paths: Iterable[Path]) -> None:
    for path in paths:
        say(path)


@contextmanager
def printed_whole() -> Iterator[Console]:
    """A console of rich, printed when the block ends: rich itself would end the program at a closed pipe.

    Whatever text it is given, what a terminal would act on in it is written as escapes.
    """
    from rich.console import Console
    from rich.text import Text

    class Harmless(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str("\n".join(map(printable, text.split("\n"))), **options)

    console = Harmless(highlight=False)
    with console.capture() as capture:
        yield console
    # rich fills lines up with blanks
    print("\n".join(line.rstrip() for line in capture.get().split("\n")), end="")


def bold(text: str, colour: str | None = None) -> str:
    """Text for one line of standard output: bold, and in a colour, where that is a terminal."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return printable(text) if plain else typer.style(printable(text), fg=colour, bold=True)


def plain_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under their headers, without lines: names to the left, numbers to the right.

    Names are wrapped where a row is too long for the terminal.
    """
    titles = [header.split("\n") for header in headers]
    most = max(map(len, titles))
    titles = [[""] * (most - len(title)) + title for title in titles]
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, [*title, *(row[i] for row in cells)])) for i, title in enumerate(titles)]
    room = shutil.get_terminal_size().columns - sum(widths[1:]) - 2 * len(widths[1:])
    widths[0] = min(widths[0], max(room, _LEAST))
    lines = list(zip(*titles, strict=True))
    for name, *numbers in cells:
        first, *rest = textwrap.wrap(name, widths[0], break_on_hyphens=False) or [""]
        lines += [(first, *numbers), *((more, *[""] * len(numbers)) for more in rest)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def by_module(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each module type, and of all if there are several."""
    groups = [(str(name), rows) for name, rows in table.groupby("module", sort=False)]
    return groups if len(groups) == 1 else [*groups, ("all", table)]


def span(values: pd.Series[int]) -> str:
    """ "8", or "2-8" for values that differ."""
    low, high = values.min(), values.max()
    return str(low) if low == high else f"{low}-{high}"


class Summary:
    """Means over matrices per run, scale and checkpoint, gathered from batches of the metrics table."""

    def __init__(self) -> None:
        # run -> scale -> (step, epoch) -> per column (sum, count), and the number of matrices
        self._runs: dict[str, dict[str, dict[_Checkpoint, _Means]]] = {}
        self._columns: dict[str, str] = {}  # those that the tables have

    def add(self, metrics: pa.RecordBatch) -> None:
        keys = zip(*(metrics[name].to_pylist() for name in ("run", "scale", "step", "epoch")), strict=True)
        self._columns = _TASK_COLUMNS if "task_norm" in metrics.schema.names else _COLUMNS
        values = zip(*(metrics[name].to_pylist() for name in self._columns.values()), strict=True)
        for (run, scale, step, epoch), row in zip(keys, values, strict=True):
            scales = self._runs.setdefault(run, {})
            scales.setdefault(scale, {}).setdefault((step, epoch), _Means(len(row))).add(row)

    def print(self) -> None:
        """One small table a run; the middle of a long run is left out."""
        for run, scales in islice(self._runs.items(), _MOST_RUNS):
            checkpoints = list(dict.fromkeys(key for of_scale in scales.values() for key in of_scale))
            shown = _spread(checkpoints)
            some = "" if shown == checkpoints else f" ({len(shown)} of {len(checkpoints)} checkpoints shown)"
            print(f"{bold(run)}: means over matrices{some}")
            print(_table(scales, shown, self._columns), end="\n\n")
        if (more := len(self._runs) - _MOST_RUNS) > 0:
            print(f"... and {more} more runs, in the tables")


class _Means:
    """Means of columns in which a cell may be empty."""

    def __init__(self, columns: int) -> None:
        self.rows = 0
        self._sums = [0.0] * columns
        self._counts = [0] * columns

    def add(self, values: Sequence[float | None]) -> None:
        self.rows += 1
        for i, value in enumerate(values):
            if value is not None:
                self._sums[i] += value
                self._counts[i] += 1

    def texts(self) -> list[str]:
        return [f"{total / n:.4g}" if n else "-" for total, n in zip(self._sums, self._counts, strict=True)]


def _table(scales: dict[str, dict[_Checkpoint, _Means]], shown: list[_Checkpoint], columns: Iterable[str]) -> str:
    rows = []
    for scale, of_scale in scales.items():
        for step, epoch in shown:
            if means := of_scale.get((step, epoch)):
                when = f"{epoch:g}" if epoch is not None else f"step {step}" if step is not None else "-"
                rows.append([scale, when, str(means.rows), *means.texts()])
    return plain_table(["scale", "epoch", "matrices", *columns], rows)


def _spread(items: list[_T], most: int = 12) -> list[_T]:
    """The first, the last and evenly spread items between them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def with_options(error: AnalysisError) -> str:
    """The message, with the arguments that it speaks of as options: ``--top-k 8`` for ``top_k=8``."""
    message = str(error)
    for name in error.arguments:
        option = "--" + name.replace("_", "-")
        message = re.sub(rf"(?<!\S){name}=(True\b|(?=[,;:\s]|\.?(?:\s|$)))", option, message)
        message = re.sub(rf"(?<!\S){name}=", f"{option} ", message)
    return message
