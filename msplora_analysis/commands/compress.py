"""``msplora-analyze compress``: an adapter as a plain PEFT LoRA adapter of lower rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Options

if TYPE_CHECKING:
    import pandas as pd


@command(
    "Write the best approximation of an adapter by a plain PEFT LoRA adapter of lower rank.",
    examples=(
        "msplora-analyze compress runs/lora-64/checkpoint-500 --out small --energy 0.9",
        "msplora-analyze compress runs/lora-64/checkpoint-500 --out small --rank 8",
        "msplora-analyze compress runs/msplora/checkpoint-270 --out small --budget 73728",
    ),
)
def compress(
    adapter: arguments.AdapterPath,
    out: arguments.NewAdapter,
    energy: Annotated[
        float | None,
        typer.Option(metavar="E", help="Keep this share of the sum of sigma² of every module.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, metavar="R", help="Keep this rank of every module.", show_default=False)
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PARAMS",
            help="Keep so many parameters (heads not counted), where they lower the total error most.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str | None, arguments.factor_type("float32; float64 for an adapter in float64")] = None,
    overwrite: arguments.Overwrite = False,
    semantics: arguments.SemanticsChoice = arguments.Semantics.paper,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Write the best low-rank approximation of an adapter as a plain PEFT LoRA adapter.

    Give one of --energy, --rank and --budget. The approximation is the truncated singular value
    decomposition of every module's update, from the factors alone. Prints what is kept and the
    error; DIR/ranks.csv has a row for each module. What that does to the task's metric, only an
    evaluation tells.
    """
    if sum(choice is not None for choice in (energy, rank, budget)) != 1:
        raise typer.BadParameter("give one of the three", param_hint="--energy, --rank, --budget")
    from msplora_analysis.write.truncate import compressed

    options = Options(ignore_unknown, semantics.value)
    table, source, chosen = compressed(adapter, out, energy, rank, budget, dtype, overwrite, options)
    with terminal.closed_pipe_ignored():
        headers = ["module", "number", "rank", "rank\nkept", "parameters", "parameters\nkept", "energy\nkept", "error"]
        with terminal.printed_whole() as console:
            groups = [[name, *_cells(rows)] for name, rows in terminal.by_module(table)]
            console.print(terminal.plain_table(headers, groups), end="\n\n")
        dropped = table.loc[table["rank"] == 0, "name"]
        if len(dropped):
            more = ", ..." if len(dropped) > 3 else ""
            terminal.say(f"left out, as rank 0 is kept of them ({len(dropped)}): {', '.join(dropped[:3])}{more}")
        terminal.say(f"parameters: {source.parameters:,} in the file, {table['parameters'].sum():,} kept ({chosen})")
        terminal.print_paths([out])


def _cells(rows: pd.DataFrame) -> list[str]:
    """Number, ranks, parameters, energy, and error relative to the norm of all of the rows together."""
    total = float((rows["norm"] ** 2).sum())
    lost = float(((rows["norm"] * rows["error"]) ** 2).sum())
    share = lost / total if total else 0.0
    return [
        str(len(rows)),
        terminal.span(rows["rank_before"]),
        terminal.span(rows["rank"]),
        f"{rows['parameters_before'].sum():,}",
        f"{rows['parameters'].sum():,}",
        f"{1 - share:.2%}",
        f"{share**0.5:.3g}",
    ]
