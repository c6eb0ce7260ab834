"""``msplora-analyze figures``: figures 3 and 4 of the MSPLoRA paper, and more."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Execution, Options


@command(
    "Draw figures 3 and 4 of the MSPLoRA paper, and more.",
    examples=(
        "msplora-analyze figures runs --out figures",
        "msplora-analyze figures runs/lora runs/msplora --out figures --format pdf --format svg",
        "msplora-analyze figures tables --out figures --style icml-column",
        "msplora-analyze figures tables/spectra.parquet --out figures",
        "msplora-analyze figures runs --out figures --weights moments",
    ),
)
def figures(
    paths: arguments.Paths,
    out: arguments.Out,
    format: Annotated[
        list[arguments.FigureFormat] | None,
        typer.Option(
            metavar="pdf|png|svg",
            help="File format; may be repeated.  [default: pdf and png]",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        arguments.Weights,
        typer.Option(
            metavar="moments|none",
            help="moments: draw the figures of spectra of the task-weighted ones, as files whose names end in _task.",
        ),
    ] = arguments.Weights.none,
    moments: arguments.Moments = None,
    style: arguments.StyleOption = None,
    workers: arguments.Workers = None,
    cache: arguments.UseCache = True,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Draw what the adapters show: figures 3 and 4 of the MSPLoRA paper, and more.

    PATH may also be a table that `msplora-analyze spectra` wrote (spectra.parquet or spectra.csv), or its folder.
    Then nothing is computed again. Tables of `msplora-measure ablate` are drawn too.
    """
    formats = tuple(f.value for f in format or (arguments.FigureFormat.pdf, arguments.FigureFormat.png))
    from msplora_analysis.tables.gather import gather_ablations, gather_redundancy, gather_spectra

    arguments.check_style(style, formats)
    arguments.make_folder(out)
    options, is_weighted = Options(ignore_unknown, moments=moments), weights is not arguments.Weights.none
    table = pairs = scales = None
    ablation, adapters = gather_ablations(paths)
    _say_copies(adapters)
    if adapters:
        with terminal.progress_bar("Reading") as progress:
            table = gather_spectra(adapters, options, Execution(workers, cache=cache, progress=progress))
    if adapters and not is_weighted:
        with terminal.progress_bar("Comparing") as progress:
            pairs, scales = gather_redundancy(adapters, options, Execution(workers, progress=progress))
    from msplora_analysis.show.figures import write_figures

    written = write_figures(
        table,
        out,
        formats,
        pairs=pairs,
        scales=scales,
        ablation=ablation,
        weights=weights.value,
        style=style,
        workers=workers,
    )
    with terminal.closed_pipe_ignored():
        terminal.print_paths(written)


def _say_copies(paths: list[StrPath]) -> None:
    """Adapters that were written from others, which a search of a wide folder finds too, are runs of their own."""
    from msplora_analysis.adapters.discovery import discover
    from msplora_analysis.tables.gather import table_at
    from msplora_analysis.write.write import TABLE_NAME

    found = discover(searched) if (searched := [path for path in paths if table_at(path) is None]) else []
    folders = [one.file.parent for one in found if isinstance(one.file, Path)]
    copies = [folder for folder in folders if (folder / TABLE_NAME).is_file()]
    if copies and len(copies) < len(found):
        warnings.warn(
            f"{len(copies)} of {len(found)} adapters were written from others ({TABLE_NAME} lies beside them), such as "
            f"{copies[0]}: figures have them as runs of their own; give the run folders alone to leave them out",
            stacklevel=2,
        )
