"""The command ``msplora-analyze``. Whatever is slow to import is imported inside a command."""

from __future__ import annotations

import os
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn, TextIO

import typer

from msplora_analysis.errors import AnalysisError
from msplora_analysis.options import Options
from msplora_analysis.terminal import Summary, closed_pipe_ignored, interruptible, print_paths, progress_bar

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


class Semantics(str, Enum):
    paper = "paper"
    as_executed = "as-executed"


Workers = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Processes to compute with.  [default: one for each CPU]", show_default=False
    ),
]

Dask = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Compute on the Dask cluster of this scheduler.", show_default=False),
]

UseCache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Use what earlier calls computed of the same files.")
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
    workers: Workers = None,
    dask: Dask = None,
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="Leave adapters out that cannot be read; list them at the end (status 1)."),
    ] = False,
    cache: UseCache = True,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Read full checkpoints, as their difference to this model (a folder or file).",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="With --base: singular values to compute of each matrix.  [default: all of small ones, else 64]",
            show_default=False,
        ),
    ] = None,
    semantics: Annotated[
        Semantics,
        typer.Option(
            metavar="paper|as-executed",
            help="For checkpoints of the released MSPLoRA code: the paper's sharing, or what that code computed.",
        ),
    ] = Semantics.paper,
    ignore_unknown: IgnoreUnknown = False,
) -> None:
    """Write the singular values of every adapter, and measures of each matrix.

    Makes DIR/spectra.FORMAT (one row per singular value) and DIR/metrics.FORMAT (one row per
    matrix), and prints a summary of each run.
    """
    ks = _parse_ks(k or [])
    options = Options(ignore_unknown, semantics.value, str(base) if base else None, top_k)
    from msplora_analysis.files import discover
    from msplora_analysis.stream import write_tables
    from msplora_analysis.tables import KS, spectra_of

    _make_folder(out)
    adapters = discover(paths, full=base is not None)
    summary = Summary()
    with interruptible() as stopped, progress_bar("Reading") as progress:
        written = write_tables(
            adapters,
            spectra_of(adapters, options, workers, dask, cache, progress),
            out,
            format.value,
            {*KS, *ks},
            keep_going=keep_going,
            stopped=stopped,
            seen=summary.add,
        )
        interrupted = stopped()
    with closed_pipe_ignored():
        summary.print()
        print_paths(written.paths)
    for failure in written.failures:
        print(f"error: {failure.message}", file=sys.stderr)
    if written.failures:
        print(f"error: {len(written.failures)} of {len(adapters)} adapters are left out", file=sys.stderr)
    if interrupted:
        more = "; the same command again completes the tables" if cache else ""
        print(f"interrupted: {written.done} of {len(adapters)} adapters are in the tables{more}", file=sys.stderr)
        raise SystemExit(130)
    if written.failures:
        raise SystemExit(1)


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
    workers: Workers = None,
    cache: UseCache = True,
    ignore_unknown: IgnoreUnknown = False,
) -> None:
    """Draw what the adapters show: figures 3 and 4 of the MSPLoRA paper, and more.

    PATH may also be a table that `msplora-analyze spectra` wrote (spectra.parquet or spectra.csv),
    or the folder that holds it: nothing is then computed again.
    """
    formats = tuple(f.value for f in format or (FigureFormat.pdf, FigureFormat.png))
    from msplora_analysis.tables import gather_spectra

    _make_folder(out)
    with progress_bar("Reading") as progress:
        table = gather_spectra(paths, workers=workers, cache=cache, ignore_unknown=ignore_unknown, progress=progress)
    from msplora_analysis.figures import write_figures

    written = write_figures(table, out, formats)
    with closed_pipe_ignored():
        print_paths(written)


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


if __name__ == "__main__":
    main()
