"""``msplora-analyze check``: what the programs that read adapters will do with one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.errors import printable
from msplora_analysis.options import Options
from msplora_core.records import text_of

if TYPE_CHECKING:
    from msplora_analysis.ask.readers.base import Fault
    from msplora_analysis.files.addresses import Place

_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


@command(
    "Tell what vLLM, llama.cpp, diffusers, ... will do with an adapter: scale, refusals, losses.",
    examples=(
        "msplora-analyze check runs/llama/checkpoint-500",
        "msplora-analyze check adapter --for vllm",
        "msplora-analyze check adapter --for llama.cpp --sarif check.sarif",
    ),
)
def check(
    adapter: arguments.AdapterPath,
    reader: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="vllm|sglang|tgi|llama.cpp|mlx|diffusers|comfyui|peft",
            help="One reader; its errors then end with status 1.  [default: all]",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per finding.")] = False,
    sarif: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the findings as SARIF 2.1.0 too.", show_default=False)
    ] = None,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Tell what each program that reads adapters will do with this one: which scale it applies, what it refuses, what
    it leaves out. Each answer has its evidence, its source, and the command that repairs it.

    The exit status is 1 if there is an error for every reader, or for the reader of --for.
    """
    from msplora_analysis.ask.readers import check as findings_of
    from msplora_analysis.ask.readers import readers, verdicts
    from msplora_analysis.ask.readers.base import WANTS_EXPORT
    from msplora_analysis.write.source import find_adapter

    if reader not in (None, *readers()):
        raise typer.BadParameter(f"{reader!r} is not one of {', '.join(readers())}.", param_hint="--for")
    found_at = find_adapter(adapter)
    found = findings_of(found_at, reader, Options(ignore_unknown), adapter)
    # That another reader wants another form is no fault of the adapter where nobody asked.
    faults = [one for one in found if reader is not None or (one.id != "layout" and one.effect != WANTS_EXPORT)]
    if sarif is not None:
        _write_sarif(sarif, faults, found_at.file)
    with terminal.closed_pipe_ignored():
        if as_json:
            shown = [one.name for one, _ in verdicts(found) if reader in (None, one.name)]
            outcome = {one.name: verdict for one, verdict in verdicts(found) if one.name in shown}
            about = {"adapter": str(found_at.file), "readers": outcome, "findings": [one._asdict() for one in found]}
            print(text_of(about))
        else:
            _print(found, faults, reader)
    if any(one.severity == "error" and one.reader in ("", reader) for one in found):
        raise typer.Exit(1)


def _write_sarif(path: Path, faults: list[Fault], file: Place) -> None:
    from msplora_analysis.ask.readers.sarif import as_sarif
    from msplora_core.atomic import replacing

    uri = str(file)
    if isinstance(file, Path):  # code hosts find files by their place in the repository
        uri = file.relative_to(Path.cwd()).as_posix() if file.is_relative_to(Path.cwd()) else file.as_uri()
    with replacing(path) as beside:
        beside.write_text(text_of(as_sarif(faults, uri)) + "\n", encoding="utf-8")


def _print(found: list[Fault], faults: list[Fault], reader: str | None) -> None:
    """What comes of it with each reader, then the faults, the worst first."""
    from msplora_analysis.ask.readers import readers, verdicts
    from msplora_analysis.ask.readers.base import WANTS_EXPORT

    rows = []
    for one, verdict in verdicts(found):
        if reader in (None, one.name):
            mine = [finding.severity for finding in found if finding.reader in ("", one.name)]
            outcome = f"{verdict} --to {one.to.split()[0]}" if verdict == WANTS_EXPORT else verdict
            rows.append([one.title, outcome, str(mine.count("error")), str(mine.count("warning"))])
    print(terminal.plain_table(["reader", "outcome", "errors", "warnings"], rows), end="\n\n")
    for finding in faults:
        who = readers()[finding.reader].title if finding.reader else "every reader"
        severity = terminal.bold(finding.severity, _COLOURS[finding.severity])
        print(f"{severity} {terminal.bold(who)}: {printable(finding.title)}")
        terminal.say(f"  {finding.evidence}")
        terminal.say(f"  source: {finding.source}")
        terminal.say(f"  try: {finding.remedy}")
        print()
    if not faults:
        print("No findings.")
