"""``msplora-analyze export``: an adapter as a plain PEFT LoRA adapter, without loss."""

from __future__ import annotations

from typing import Annotated

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Options


@command(
    "Write MSPLoRA, AdaLoRA, VeRA, ... as a plain PEFT LoRA adapter, without loss.",
    examples=(
        "msplora-analyze export runs/msplora/checkpoint-270 --out plain",
        "msplora-analyze export hf://owner/vera --out plain",
    ),
)
def export(
    adapter: arguments.AdapterPath,
    out: arguments.NewAdapter,
    dtype: Annotated[str | None, arguments.factor_type("the file's where that is exact, else float32")] = None,
    overwrite: arguments.Overwrite = False,
    semantics: arguments.SemanticsChoice = arguments.Semantics.paper,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Write an adapter as a plain PEFT LoRA adapter that computes the same.

    The products of a module become one by concatenation: MSPLoRA's has rank r_g + r_m + r_l. What
    is saved beside them (heads, biases) is copied. What no plain LoRA equals (DoRA, LoHa, LoKr, full
    fine-tuning) is refused.
    """
    from msplora_analysis.write.concatenate import exported

    table, source, chosen = exported(adapter, out, dtype, overwrite, Options(ignore_unknown, semantics.value))
    with terminal.closed_pipe_ignored():
        groups = [
            [module, str(len(rows)), terminal.span(rows["rank"]), f"{rows['parameters'].sum():,}"]
            for module, rows in terminal.by_module(table)
        ]
        with terminal.printed_whole() as console:
            console.print(terminal.plain_table(["module", "number", "rank", "parameters"], groups), end="\n\n")
        print(
            f"parameters: {source.parameters:,} in the file, {table['parameters'].sum():,} as a plain LoRA ({chosen})"
        )
        terminal.print_paths([out])
