"""``msplora-analyze report``: all of it on one page."""

from __future__ import annotations

from typing import Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command


@command(
    "Write one HTML page: findings, charts to explore, tables; for one run, or several compared.",
    examples=(
        "msplora-analyze report runs/cola",
        "msplora-analyze report runs/lora runs/msplora --out comparison.html",
        "msplora-analyze report tables/spectra.parquet --out report.html",
    ),
)
def report(
    paths: arguments.Paths,
    out: Annotated[str, typer.Option(metavar="FILE", help="HTML file to write.")] = "report.html",
    moments: arguments.Moments = None,
    workers: arguments.Workers = None,
    cache: arguments.UseCache = True,
    ignore_unknown: arguments.IgnoreUnknown = False,
    semantics: arguments.SemanticsChoice = arguments.Semantics.paper,
) -> None:
    """Write everything on one page: findings, charts to explore, tables that sort and filter.

    The page is one file that needs no network. Open it in any browser, send it, or print it. PATH may also be a
    table that `msplora-analyze spectra` wrote (spectra.parquet or spectra.csv), or its folder.
    """
    from msplora_analysis.show.report import report as write_report

    with terminal.progress_bar("Reading") as progress:
        written = write_report(
            paths,
            out,
            moments=moments,
            workers=workers,
            cache=cache,
            ignore_unknown=ignore_unknown,
            semantics=semantics.value,
            progress=progress,
        )
    with terminal.closed_pipe_ignored():
        terminal.print_paths([written])
