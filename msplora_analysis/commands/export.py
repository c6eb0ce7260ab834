"""``msplora-analyze export``: an adapter as a plain PEFT LoRA adapter, without loss."""

from __future__ import annotations

from typing import Annotated

import typer

from msplora_analysis.commands.shared.adapter import AdapterPath, Folder, Overwrite, by_module, span
from msplora_analysis.commands.shared.arguments import IgnoreUnknown, Semantics, SemanticsChoice
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.commands.shared.terminal import closed_pipe_ignored, plain_table, print_paths, printed_whole
from msplora_analysis.options import Options


@command(
    "Write MSPLoRA, AdaLoRA, VeRA, ... as a plain PEFT LoRA adapter, without loss.",
    examples=(
        "msplora-analyze export runs/msplora/checkpoint-270 --out plain",
        "msplora-analyze export hf://owner/vera --out plain",
    ),
)
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
        with printed_whole() as console:
            console.print(plain_table(["module", "number", "rank", "parameters"], groups), end="\n\n")
        print(
            f"parameters: {source.parameters:,} in the file, {table['parameters'].sum():,} as a plain LoRA ({chosen})"
        )
        print_paths([out])
