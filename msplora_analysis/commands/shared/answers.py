"""Advice on the terminal: whole, or the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msplora_analysis.commands.shared.terminal import plain_table, printed_whole

if TYPE_CHECKING:
    from rich.console import Console

    from msplora_analysis.ask.advice.advise import RunAdvice

_MOST_RUNS = 4  # whose answers stand below something else


def print_advice(advice: RunAdvice) -> None:
    """A title, the answers with their evidence, and the table of ranks."""
    from msplora_analysis.ask.advice.tell import RANK_HEADERS, rank_cells

    with printed_whole() as console:
        _answers(console, advice, evidence=True)
        console.out(plain_table(RANK_HEADERS, rank_cells(advice.ranks)), end="\n\n")


def print_answers(found: Sequence[RunAdvice]) -> None:
    """The answers on each run, without what they rest on."""
    if not found:
        return
    with printed_whole() as console:
        for advice in found[:_MOST_RUNS]:
            console.print()
            _answers(console, advice, evidence=False)
        more = len(found) - _MOST_RUNS
        others = f", and what it says of {more} more run{'s' * (more > 1)}" if more > 0 else ""
        console.print(f"\nThe evidence for each answer{others}: msplora-analyze advise PATH")


def _answers(console: Console, advice: RunAdvice, *, evidence: bool) -> None:
    from rich.markup import escape
    from rich.padding import Padding

    from msplora_analysis.ask.advice.tell import title
    from msplora_analysis.errors import printable

    console.print(f"[bold]{escape(title(advice))}[/bold]", end="\n\n" if evidence else "\n")
    told = None
    for answer in advice.answers:
        console.print(f"{escape(answer.question)} [bold]{escape(answer.answer)}[/bold]")
        for line in (answer.evidence, answer.sure) if evidence else ():
            if line:
                console.print(Padding(f"[dim]{escape(line)}[/dim]", (0, 0, 0, 2)))
        if answer.command and answer.command != told:
            told = answer.command
            console.print(f"  $ {escape(printable(answer.command))}", soft_wrap=True)
        if evidence:
            console.print()
