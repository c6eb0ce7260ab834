"""``msplora-analyze report``: all of it on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msplora_analysis.commands.shared.arguments import (
    IgnoreUnknown,
    Paths,
    Semantics,
    SemanticsChoice,
    UseCache,
    Workers,
)
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.commands.shared.terminal import closed_pipe_ignored, print_paths, progress_bar


@command(
    "Write one HTML page: findings, charts to explore, tables; for one run, or several compared.",
    examples=(
        "msplora-analyze report runs/cola",
        "msplora-analyze report runs/lora runs/msplora --out comparison.html",
        "msplora-analyze report tables/spectra.parquet --out report.html",
    ),
)
def report(
    paths: Paths,
    out: Annotated[Path, typer.Option(metavar="FILE", help="HTML file to write.")] = Path("report.html"),
    workers: Workers = None,
    cache: UseCache = True,
    ignore_unknown: IgnoreUnknown = False,
    semantics: SemanticsChoice = Semantics.paper,
) -> None:
    """Write all that the adapters show on one page: findings, charts to explore, tables that sort and filter.

    The page is one file that needs no network: open it in any browser, send it, print it. PATH may
    also be a table that `msplora-analyze spectra` wrote (spectra.parquet or spectra.csv), or the
    folder that holds it.
    """
    from msplora_analysis.show.report import report as write_report

    with progress_bar("Reading") as progress:
        written = write_report(
            paths,
            out,
            workers=workers,
            cache=cache,
            ignore_unknown=ignore_unknown,
            semantics=semantics.value,
            progress=progress,
        )
    with closed_pipe_ignored():
        print_paths([written])
