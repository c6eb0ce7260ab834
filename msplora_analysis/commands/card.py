"""``msplora-analyze card``: a section on the update in an adapter's README.md."""

from __future__ import annotations

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Execution, Options


@command(
    "Add a section to an adapter's README.md for the Hub: ranks, findings, a figure.",
    examples=("msplora-analyze card runs/cola/checkpoint-5360",),
)
def card(
    adapter: arguments.AdapterPath,
    moments: arguments.Moments = None,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Write a section into the README.md beside an adapter: ranks, answers, findings and one figure.

    The file is created if needed. A section of an earlier call is replaced. The rest stays as it is.
    """
    from msplora_analysis.show.card import write_card

    written = write_card(adapter, Options(ignore_unknown, moments=moments), Execution())
    with terminal.closed_pipe_ignored():
        terminal.print_paths(written)
