"""The command ``msplora-analyze``. Whatever is slow to import is imported inside a command."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TextIO

import typer

from msplora_analysis.errors import AnalysisError

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from msplora_analysis.tables import Progress

app = typer.Typer(
    help="Spectral analysis of LoRA and MSPLoRA adapters, from the files that training leaves.",
    epilog="Run `msplora-analyze COMMAND --help` for the options and examples of a command.",
    # Plain help starts in less than half the time of rich help.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    # Without a value here, `COMMAND --help` makes typer import pydantic to check that none is given.
    context_settings={"default_map": {"help": False}},
)


class TableFormat(str, Enum):
    parquet = "parquet"
    csv = "csv"


class FigureFormat(str, Enum):
    pdf = "pdf"
    png = "png"
    svg = "svg"


Paths = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATH",
        help="Trainer output folders, adapter folders or files, or folders of such (searched recursively).",
        show_default=False,
    ),
]

IgnoreUnknown = Annotated[
    bool,
    typer.Option("--ignore-unknown", help="Leave out tensors that fit no part of an adapter, and go on."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from msplora_analysis import __version__

        print(f"msplora-analyze {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def _parse_ks(values: list[str]) -> list[int]:
    ks = [text.strip() for value in values for text in value.split(",")]
    if not all(text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) for text in ks):
        raise typer.BadParameter("expected whole numbers of at least 1, such as 8 or 8,16", param_hint="--k")
    return [int(text) for text in ks]


@app.command(
    short_help="Write tables: the singular values of every adapter, measures of each matrix.",
    epilog="""Examples:

\b
  msplora-analyze spectra runs/cola --out tables
  msplora-analyze spectra runs --out tables --format csv
  msplora-analyze spectra adapter/adapter_model.safetensors --out tables --k 8,16
""",
)
def spectra(
    paths: Paths,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the tables to.", show_default=False)],
    format: Annotated[
        TableFormat, typer.Option(metavar="parquet|csv", help="File format of the tables.")
    ] = TableFormat.parquet,
    k: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K",
            help="Also give M_eff-K, beside K = 1, 2, 4; may be repeated or a list (8,16).",
            show_default=False,
        ),
    ] = None,
    ignore_unknown: IgnoreUnknown = False,
) -> None:
    """Write the singular values of every adapter, and measures of each matrix.

    Makes DIR/spectra.FORMAT (one row per singular value) and DIR/metrics.FORMAT (one row per
    matrix), and prints a summary of each run.
    """
    ks = _parse_ks(k or [])
    from msplora_analysis.tables import KS, load_tables, write_table

    _make_folder(out)
    with _progress("Reading adapters") as progress:
        tables = load_tables(paths, ks={*KS, *ks}, ignore_unknown=ignore_unknown, progress=progress)
    written = []
    for name, table in tables._asdict().items():
        written.append(out / f"{name}.{format.value}")
        write_table(table, written[-1])
    with _closed_pipe_ignored():
        _print_summary(tables.metrics)
        _print_paths(written)


@app.command(
    short_help="Draw figures 3 and 4 of the MSPLoRA paper, and more.",
    epilog="""Examples:

\b
  msplora-analyze figures runs --out figures
  msplora-analyze figures runs/lora runs/msplora --out figures --format pdf --format svg
  msplora-analyze figures tables/spectra.parquet --out figures
""",
)
def figures(
    paths: Paths,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the figures to.", show_default=False)],
    format: Annotated[
        list[FigureFormat] | None,
        typer.Option(
            metavar="pdf|png|svg",
            help="File format; may be repeated.  [default: pdf and png]",
            show_default=False,
        ),
    ] = None,
    ignore_unknown: IgnoreUnknown = False,
) -> None:
    """Draw what the adapters show: figures 3 and 4 of the MSPLoRA paper, and more.

    PATH may also be a table that `msplora-analyze spectra` wrote (spectra.parquet or spectra.csv),
    or the folder that holds it: nothing is then computed again.
    """
    formats = tuple(f.value for f in format or (FigureFormat.pdf, FigureFormat.png))
    from msplora_analysis.tables import gather_spectra

    _make_folder(out)
    with _progress("Reading adapters") as progress:
        table = gather_spectra(paths, ignore_unknown=ignore_unknown, progress=progress)
    from msplora_analysis.figures import write_figures

    written = write_figures(table, out, formats)
    with _closed_pipe_ignored():
        _print_paths(written)


def main() -> NoReturn:
    """Entry point: exit status 0 done, 1 bad input (one line on stderr), 2 wrong usage."""
    # Factors are small: more than one BLAS thread is slower. It must be set before numpy starts.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    warnings.showwarning = _print_warning
    try:
        app(prog_name="msplora-analyze")
    except AnalysisError as error:
        message = str(error)
    except OSError as error:  # whatever no module foresaw, such as a full disk
        message = f"{error.filename or 'system'}: {error.strerror or error}"
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise AnalysisError(f"--out {folder}: not a folder; give another path") from None
    except OSError as error:
        raise AnalysisError(f"--out {folder}: cannot be made: {error.strerror}") from None


@contextmanager
def _progress(what: str) -> Iterator[Progress | None]:
    """A bar on standard error while adapters are read, if a person is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _closed_pipe_ignored() -> Iterator[None]:
    """The files are written: that nobody reads the rest of the output (`| head`) is no failure."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_paths(paths: Sequence[Path]) -> None:
    for path in paths:
        print(path)


def _print_summary(metrics: pd.DataFrame) -> None:
    """Means over matrices, per run, scale and epoch; the middle of a long run is left out."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    with console.capture() as capture:  # rich would end the program at a closed pipe
        for run, of_run in metrics.groupby("run", sort=False):
            steps = list(dict.fromkeys(of_run["step"].fillna(-1)))
            shown = _spread(steps)
            some = "" if shown == steps else f" ({len(shown)} of {len(steps)} checkpoints shown)"
            console.print(f"[bold]{escape(str(run))}[/bold]: means over matrices{some}")
            console.print(_means(of_run, shown), end="\n\n")
    print(capture.get(), end="")


def _means(metrics: pd.DataFrame, steps: list[int]) -> Table:
    from rich.table import Table

    columns = {
        "sigma_1": "sigma_1",
        "effective\nrank": "effective_rank",
        "stable\nrank": "stable_rank",
        "M_eff-1": "m_eff_1",
        "M_eff-4": "m_eff_4",
    }
    table = Table("scale", box=None, pad_edge=False)
    for header in ("epoch", "matrices", *columns):
        table.add_column(header, justify="right", no_wrap=True)
    for scale, of_scale in metrics.groupby("scale", sort=False):
        for step in steps:
            rows = of_scale[of_scale["step"].fillna(-1) == step]
            if len(rows):
                values = (_text(rows[column].mean()) for column in columns.values())
                table.add_row(str(scale), _when(rows), str(len(rows)), *values)
    return table


def _when(rows: pd.DataFrame) -> str:
    epoch, step = (rows[column].dropna() for column in ("epoch", "step"))
    return f"{epoch.iloc[0]:g}" if len(epoch) else f"step {step.iloc[0]}" if len(step) else "-"


def _text(value: float) -> str:
    return "-" if value != value else f"{value:.4g}"


def _spread(items: list[int], most: int = 6) -> list[int]:
    """The first, the last and evenly spread items between them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


if __name__ == "__main__":
    main()
