"""``msplora-analyze spectra``: singular values and measures of every matrix, as tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Execution, Options

if TYPE_CHECKING:
    from msplora_analysis.errors import AnalysisError


@command(
    "Write tables: the singular values of every adapter, measures of each matrix.",
    examples=(
        "msplora-analyze spectra runs/cola --out tables",
        "msplora-analyze spectra runs --out tables --format csv",
        "msplora-analyze spectra adapter/adapter_model.safetensors --out tables --k 8,16",
    ),
)
def spectra(
    paths: arguments.Paths,
    out: arguments.Out,
    format: arguments.Format = arguments.TableFormat.parquet,
    k: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K",
            help="Compute M_eff-K for this K too, beside 1, 2 and 4; may be repeated, or a list (8,16).",
            show_default=False,
        ),
    ] = None,
    workers: arguments.Workers = None,
    dask: arguments.Dask = None,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going", help="Leave out adapters that cannot be read; list them at the end (exit status 1)."
        ),
    ] = False,
    cache: arguments.UseCache = True,
    base: arguments.Base = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="With --base: singular values to compute of each matrix.  [default: all of small ones, else 64]",
            show_default=False,
        ),
    ] = None,
    device: arguments.Device = "cpu",
    moments: arguments.Moments = None,
    semantics: arguments.SemanticsChoice = arguments.Semantics.paper,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Write the singular values of every adapter, and measures of each matrix.

    Writes DIR/spectra.FORMAT (one row per singular value) and DIR/metrics.FORMAT (one row per matrix), and prints a
    summary of each run. For an adapter with moments (msplora-measure moments), both have task-weighted columns.
    """
    ks = _parse_ks(k or [])
    options = Options(ignore_unknown, semantics.value, base, top_k, moments)
    from msplora_analysis.adapters.discovery import discover
    from msplora_analysis.adapters.moments import have_moments
    from msplora_analysis.tables.load import KS, spectra_of
    from msplora_analysis.tables.stream import write_tables

    arguments.make_folder(out)
    unfound: list[AnalysisError] = []
    adapters = discover(paths, full=base is not None, failed=unfound if keep_going else None)
    summary = terminal.Summary()
    with terminal.interruptible() as stopped, terminal.progress_bar("Reading") as progress:
        written = write_tables(
            adapters,
            spectra_of(adapters, options, Execution(workers, dask, cache, progress, device)),
            out,
            format.value,
            {*KS, *ks},
            task=have_moments(adapters, options),
            keep_going=keep_going,
            stopped=stopped,
            seen=summary.add,
        )
        interrupted = stopped()
    with terminal.closed_pipe_ignored():
        summary.print()
        terminal.print_paths(written.paths)
    errors = [*unfound, *(failure.error for failure in written.failures)]
    for error in errors:
        print(f"error: {terminal.with_options(error)}", file=sys.stderr)
    if errors:
        total = len(adapters) + len(unfound)
        print(f"error: {len(errors)} of {total} adapters are left out", file=sys.stderr)
    if interrupted:
        more = "; the same command again completes the tables" if cache else ""
        print(f"interrupted: {written.done} of {len(adapters)} adapters are in the tables{more}", file=sys.stderr)
        raise SystemExit(130)
    if errors:
        raise SystemExit(1)


def _parse_ks(values: list[str]) -> list[int]:
    ks = [text.strip() for value in values for text in value.split(",")]
    if not all(text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) for text in ks):
        raise typer.BadParameter("expected whole numbers of at least 1, such as 8 or 8,16", param_hint="--k")
    return [int(text) for text in ks]
