"""``msplora-analyze diagnose``: what deserves a look."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.answers import print_answers
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Execution, Options
from msplora_analysis.tables.rows import rows_of
from msplora_core.records import text_of

if TYPE_CHECKING:
    import pandas as pd

_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}
_SHOWN = 4  # places named in full, of each finding


@command(
    "List what deserves a look: faults, alike layers, unused rank. Then the short answers of advise.",
    examples=(
        "msplora-analyze diagnose runs/cola",
        "msplora-analyze diagnose runs --json > findings.json",
        "msplora-analyze diagnose runs/cola --base models/roberta-base",
    ),
)
def diagnose(
    paths: arguments.Paths,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: findings, one per place, and advice.")] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare the updates with the weights of the model that was trained (a folder or file).",
            show_default=False,
        ),
    ] = None,
    workers: arguments.Workers = None,
    cache: arguments.UseCache = True,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """List what in the adapters deserves a look, with the evidence and what to try. Then print the answers of `advise`.

    Findings are evidence, not verdicts: a spectrum does not prove what rank a task needs. docs/findings.md explains
    each one, and how often healthy runs have it. The exit status is 0 whatever is found.
    """
    from msplora_analysis.ask.advice.gather import advise_known
    from msplora_analysis.ask.advice.tell import as_object
    from msplora_analysis.ask.evidence import gather
    from msplora_analysis.ask.findings import diagnose as findings_of

    with terminal.progress_bar("Reading") as progress:
        execution = Execution(workers, cache=cache, progress=progress)
        evidence = gather(paths, Options(ignore_unknown), execution, model=base)
        found, advice = findings_of(evidence), advise_known(evidence)
    with terminal.closed_pipe_ignored():
        if as_json:
            print(text_of({"findings": as_objects(found), "advice": [as_object(one) for one in advice]}))
        else:
            print_findings(found)
            print_answers(advice)


def as_objects(findings: pd.DataFrame) -> list[dict[str, object]]:
    """One object per finding and place, empty cells null."""
    rows = rows_of(findings.astype(object).where(findings.notna(), None))
    for row in rows:
        row["details"] = json.loads(row["details"]) if row["details"] else {}
        for name in ("value", "threshold"):  # JSON has no infinity
            row[name] = None if row[name] in (float("inf"), float("-inf")) else row[name]
    return rows


def print_findings(findings: pd.DataFrame) -> None:
    """One paragraph per kind of finding, the most severe first, with its places run by run."""
    from rich.markup import escape
    from rich.padding import Padding

    from msplora_analysis.ask.findings import KINDS, SEVERITIES

    with terminal.printed_whole() as console:
        if findings.empty:
            console.print("No findings.")
        for (severity, kind), rows in findings.groupby(["severity", "id"], sort=False):
            about = KINDS[str(kind)]
            count = f"{len(rows)} place{'s' if len(rows) > 1 else ''}"
            colour = _COLOURS[str(severity)]
            console.print(f"[bold {colour}]{severity}[/] [bold]{kind}[/]: {escape(about.title)} ({count})")
            for run, of_run in rows.groupby("run", sort=False):
                for line in _places(str(run), of_run):
                    console.print(Padding(escape(line), (0, 0, 0, 4)))
            console.print(Padding(f"[dim]threshold:[/] {escape(about.source)}", (0, 0, 0, 2)))
            console.print(Padding(f"[dim]try:[/] {escape(about.advice)}", (0, 0, 1, 2)))
        counts = findings["severity"].value_counts()
        found = [f"{counts[severity]} {severity}" for severity in SEVERITIES if severity in counts]
        if found:
            console.print(", ".join(found))


def _places(run: str, rows: pd.DataFrame) -> list[str]:
    """The first place with its evidence, then where else: a few by name, many by module and range of layers."""
    from msplora_analysis.tables.labels import when, where

    first, *others = rows_of(rows)
    lines = [f"{run}: {', '.join(filter(None, (when(first), where(first))))}: {first['evidence']}"]
    if len(others) > _SHOWN:
        lines.append(f"  and {len(others)} more: {_spread(rows.iloc[1:])}")
    elif others:
        lines.append(f"  also {', '.join(map(where, others))}")
    return lines


def _spread(rows: pd.DataFrame) -> str:
    """How many of each module, and in which layers."""
    parts = []
    for (scale, module), of_module in rows.fillna({"module": ""}).groupby(["scale", "module"], sort=False):
        low, high = of_module["group"].min(), of_module["group"].max()
        span = "" if low != low else f" in {scale} {low:g}" if low == high else f" in {scale}s {low:g}-{high:g}"
        parts.append(f"{len(of_module)} {module or 'places'}{span}")
    return ", ".join(parts)
