"""``msplora-analyze watch``: a run while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command


@command(
    "Follow a run while it trains.",
    examples=(
        "msplora-analyze watch runs/cola/msplora",
        "msplora-analyze watch runs/cola/msplora --once",
        "msplora-analyze watch runs/cola/msplora >> watch.log",
    ),
)
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output folder of a training; it may still be made.")],
    interval: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Time between two looks at the folder.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show what is there now, and end.")] = False,
    cache: arguments.UseCache = True,
) -> None:
    """Follow a run in the terminal: its new checkpoints as they come, and what deserves a look.

    Shows the mean effective rank and the mean norm of every scale and type of module: a line over the checkpoints,
    the newest value, and its change. Reads only what is new. Press q or Ctrl-C to leave. If the output is no
    terminal, it prints one line for every checkpoint.
    """
    from msplora_analysis.show.watch.watch import watch as follow

    with terminal.closed_pipe_ignored():
        follow(run.absolute(), interval=interval, once=once, cache=cache)
