"""``msplora-analyze figures``: figures 3 and 4 of the MSPLoRA paper, and more."""

from __future__ import annotations

from typing import Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
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
