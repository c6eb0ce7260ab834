"""``msplora-analyze results``: what runs scored, as a paper's table."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command


class At(str, Enum):
    best = "best"
    last = "last"


@command(
    "Print what runs scored: methods by tasks, mean and deviation over seeds, for LaTeX and Markdown.",
    examples=(
        "msplora-analyze results runs/",
        "msplora-analyze results runs/ --out tables --at last",
    ),
)
def results(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH", help="Run folders of msplora-train, or folders of such.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write results.csv, results.md and results.tex.", show_default=False),
    ] = None,
    at: Annotated[
        At, typer.Option(metavar="best|last", help="Of each run: its best epoch on the validation split, or its last.")
    ] = At.best,
) -> None:
    """Print what runs scored: one row per method, one column per task, mean ± standard deviation over seeds.

    Scores are multiplied by 100. Parameters are the trained ones, without the task's head.
    """
    from rich.markup import escape
    from rich.table import Table

    from msplora_analysis.ask.results.summary import load_results
    from msplora_analysis.show.typeset import grids, latex, markdown
    from msplora_analysis.tables.files import write_table
    from msplora_core.atomic import replacing

    table = load_results(paths, at.value)
    epoch = "best epoch on the validation split" if at is At.best else "last epoch"
    runs = table["runs"][table["metric"] != "average"]
    counts = f"{runs.min()}" if runs.min() == runs.max() else f"{runs.min()} to {runs.max()}"
    caption = f"mean and standard deviation over seeds ({counts} a cell), {epoch}."
    with terminal.closed_pipe_ignored(), terminal.printed_whole() as console:
        for grid in grids(table):
            console.print(f"[bold]{escape(grid.model)}[/bold]: {caption}", soft_wrap=True)
            shown = Table(box=None, pad_edge=False)
            for header in ("method", "parameters", *grid.headers):
                shown.add_column(escape(header), justify="left" if header == "method" else "right")
            for method, parameters, cells in grid.rows:
                texts = [f"[b]{cell.text}[/b]" if cell.best else cell.text for cell in cells]
                shown.add_row(escape(method), parameters, *texts)
            console.print(shown, end="\n\n")
    for folder in table.attrs["unfinished"]:
        terminal.say(f"left out: {folder} has no results yet (continue it with msplora-train --resume)")
    if out is not None:
        arguments.make_folder(out)
        written = [out / name for name in ("results.csv", "results.md", "results.tex")]
        write_table(table, written[0])
        for path, text in zip(written[1:], (markdown(table, caption), latex(table, caption)), strict=True):
            with replacing(path) as beside:
                beside.write_text(text, encoding="utf-8")
        terminal.print_paths(written)
