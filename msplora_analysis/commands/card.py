"""``msplora-analyze card``: a section on the update in an adapter's README.md."""

from __future__ import annotations

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Execution, Options


@command(
    "Write into an adapter's README.md what it changed: for the Hub, with a figure.",
    examples=("msplora-analyze card runs/cola/checkpoint-5360",),
)
def card(
    adapter: arguments.AdapterPath,
    moments: arguments.Moments = None,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Write a section into the README.md beside an adapter: ranks, answers, findings and one figure.

    The file is made if it is not there. A section that an earlier call wrote is replaced; all else stays.
    """
    from msplora_analysis.show.card import write_card

    written = write_card(adapter, Options(ignore_unknown, moments=moments), Execution())
    with terminal.closed_pipe_ignored():
        terminal.print_paths(written)
