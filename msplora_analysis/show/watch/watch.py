"""Follow a run in the terminal until the user leaves."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live

from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.show.watch.following import Run
from msplora_analysis.show.watch.keys import Wait, quit_key
from msplora_analysis.show.watch.screen import line, render, when

if TYPE_CHECKING:
    import pandas as pd

_HINT = "q or Ctrl-C leaves"


def watch(folder: Path, *, interval: float = 2.0, once: bool = False, cache: bool = True) -> None:
    """Show a run, and its new checkpoints as they come; where the output is no terminal, a line for every checkpoint.

    Args:
        folder: Of the run. One that will yet be made is waited for.
        interval: Seconds between two looks at the folder.
        once: Show what is there, and return.
        cache: As in ``load_tables``.

    Raises:
        AnalysisError: If there is no such run, or several.
    """
    _check(folder)
    run = Run(folder, cache=cache)
    if once:
        _show_once(run)
        return
    console = Console(highlight=False)
    with suppress(KeyboardInterrupt), quit_key() as wait:
        if console.is_terminal:
            _show(run, console, wait, interval)
        else:
            _print_lines(run, wait, interval)


def _show_once(run: Run) -> None:
    for _ in run.update():
        pass
    if not run.points and not run.writing:
        why = next((f"{name}: {reason}" for name, reason in run.problems.items()), "no adapter in it yet")
        raise AnalysisError(f"{run.folder}: {why}; leave out once=True to wait for its first checkpoint", "once")
    console = Console(highlight=False)
    with console.capture() as capture:  # rich would end the program at a closed pipe
        console.print(render(run, _findings(run), console))
    print(capture.get(), end="")


def _show(run: Run, console: Console, wait: Wait, interval: float) -> None:
    """On a screen of its own; what was seen last stays on the user's."""
    findings: pd.DataFrame | None = None
    status = ""

    def screen() -> Group:
        return render(run, findings, console, status, _HINT)

    try:
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            left = False
            while not left:
                status = _waiting(run)
                fresh = False
                for point in run.update():
                    if len(run.points) == 1:  # the first, or the folder was cleared for another training
                        findings = None
                    fresh = True
                    status = f"read {when(point)}"
                    live.update(screen(), refresh=True)
                    if left := wait(0):
                        return
                if fresh:
                    findings = _findings(run)
                status = _waiting(run) or f"looked at {time.strftime('%H:%M:%S')}"
                live.update(screen(), refresh=True)
                left = wait(interval)
    finally:
        if run.points:
            console.print(render(run, findings, console))


def _print_lines(run: Run, wait: Wait, interval: float) -> None:
    said = ""
    while True:
        for point in run.update():
            print(line(point), flush=True)
        waiting = _waiting(run)
        if waiting != said and waiting:
            print(printable(waiting), file=sys.stderr)
        said = waiting
        if wait(interval):
            return


def _waiting(run: Run) -> str:
    """What is waited for, if there is nothing to show."""
    if not run.folder.is_dir():
        return f"waiting for {run.folder}"
    return "" if run.points or run.writing else f"waiting for the first checkpoint in {run.folder}"


def _check(folder: Path) -> None:
    """Raises AnalysisError if a run will hardly come there."""
    if folder.is_dir() or (folder.parent.is_dir() and not folder.exists()):
        return
    what = "not a folder" if folder.exists() else "no such folder, nor the one it would be in"
    raise AnalysisError(f"{folder}: {what}; give the output folder of a training")


def _findings(run: Run) -> pd.DataFrame | None:
    """None if a checkpoint was deleted or changed while it was read: the next one will tell."""
    try:
        return run.findings() if run.points else None
    except AnalysisError:
        return None
