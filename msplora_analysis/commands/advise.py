"""``msplora-analyze advise``: one answer on one screen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.answers import print_advice
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Execution, Options
from msplora_core.records import text_of


@command(
    "Answer: did it learn, what rank does it use, which scales and checkpoint are worth keeping?",
    examples=(
        "msplora-analyze advise runs/cola",
        "msplora-analyze advise runs/cola/checkpoint-5360 --json",
        "msplora-measure moments runs/cola && msplora-analyze advise runs/cola",
    ),
)
def advise(
    paths: arguments.Paths,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per run.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write advice.json and the tables of ranks too.", show_default=False),
    ] = None,
    workers: arguments.Workers = None,
    cache: arguments.UseCache = True,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Answer what you have to decide on a trained adapter: its rank, its scales, its checkpoint.

    Moments beside the adapter (`msplora-measure moments`) tell what the task needs. An ablation (`msplora-measure
    ablate`) tells what cuts do to the metric. Without them some questions stay open, and the answer says which.
    """
    from msplora_analysis.ask.advice.gather import advise_all
    from msplora_analysis.ask.advice.tell import as_object, write

    with terminal.progress_bar("Reading") as progress:
        execution = Execution(workers, cache=cache, progress=progress)
        found = advise_all(paths, Options(ignore_unknown), execution)
    written = write(found, out) if out is not None else []
    with terminal.closed_pipe_ignored():
        if as_json:
            print(text_of({"advice": [as_object(one) for one in found]}))
        else:
            for one in found:
                print_advice(one)
            terminal.print_paths(written)
