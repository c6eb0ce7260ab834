"""``msplora-analyze export``: an adapter as a plain PEFT LoRA adapter, without loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msplora_analysis.commands.arguments import IgnoreUnknown, Semantics, SemanticsChoice
from msplora_analysis.commands.terminal import closed_pipe_ignored, print_paths
from msplora_analysis.options import Options

if TYPE_CHECKING:
    import pandas as pd

AdapterPath = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="Adapter folder or file, or a folder with one adapter; local, hf://owner/name, or any fsspec address.",
        show_default=False,
    ),
]

Folder = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder of the new adapter; it is made.", show_default=False)
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is in DIR.")]


def register(app: typer.Typer) -> None:
    app.command(
        short_help="Write MSPLoRA, AdaLoRA, VeRA, ... as a plain PEFT LoRA adapter, without loss.",
        epilog="""Examples:

\b
  msplora-analyze export runs/msplora/checkpoint-270 --out plain
  msplora-analyze export hf://owner/vera --out plain
""",
    )(export)


def export(
    adapter: AdapterPath,
    out: Folder,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|float16|bfloat16|float64",
            help="Type of the factors.  [default: the file's where that is exact, else float32]",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    semantics: SemanticsChoice = Semantics.paper,
    ignore_unknown: IgnoreUnknown = False,
) -> None:
    """Write an adapter as a plain PEFT LoRA adapter that computes the same.

    The products of a module become one by concatenation: MSPLoRA's has rank r_g + r_m + r_l. What
    is saved beside them (heads, biases) is copied. What no plain LoRA equals (DoRA, LoHa, LoKr, full
    fine-tuning) is refused.
    """
    from msplora_analysis.write.concatenate import exported

    table, source, chosen = exported(adapter, out, dtype, overwrite, Options(ignore_unknown, semantics.value))
    with closed_pipe_ignored():
        groups = [
            [module, str(len(rows)), span(rows["rank"]), f"{rows['parameters'].sum():,}"]
            for module, rows in by_module(table)
        ]
        print_table(["module", "number", "rank", "parameters"], groups)
        print(
            f"parameters: {source.parameters:,} in the file, {table['parameters'].sum():,} as a plain LoRA ({chosen})"
        )
        print_paths([out])


def by_module(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each module type, and of all if there are several."""
    groups = [(str(name), rows) for name, rows in table.groupby("module", sort=False)]
    return groups if len(groups) == 1 else [*groups, ("all", table)]


def span(values: pd.Series[Any]) -> str:
    """ "8", or "2-8" for values that differ."""
    low, high = values.min(), values.max()
    return str(low) if low == high else f"{low}-{high}"


def print_table(headers: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    with console.capture() as capture:  # rich would end the program at a closed pipe
        console.print(table, markup=False, end="\n\n")
    print(capture.get(), end="")
