"""``msplora-analyze export``: an adapter as a plain LoRA for PEFT or another reader, without loss."""

from __future__ import annotations

from typing import Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Options

_READERS = "peft|kohya|diffusers|mlx|gguf"


@command(
    "Write an adapter for another program, without loss: PEFT, kohya, diffusers, MLX, llama.cpp.",
    examples=(
        "msplora-analyze export runs/msplora/checkpoint-270 --out plain",
        "msplora-analyze export runs/llama --out for-llama.cpp --to gguf --base models/Llama-3.2-1B",
        "msplora-analyze export style.safetensors --out for-peft --base models/stable-diffusion-v1-5",
    ),
)
def export(
    adapter: arguments.AdapterPath,
    out: arguments.NewAdapter,
    to: Annotated[str, typer.Option(metavar=_READERS, help="The program that will read it.")] = "peft",
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that the adapter is for, where names depend on it: its folder or a pipeline's, weights, "
            "index or config.json; or a .txt with the name of a module a line.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str | None, arguments.factor_type("the file's where that is exact, else float32")] = None,
    overwrite: arguments.Overwrite = False,
    semantics: arguments.SemanticsChoice = arguments.Semantics.paper,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Write an adapter as a plain LoRA for another program. It makes the same change to the model.

    Parts of an update are concatenated: MSPLoRA's rank becomes r_g + r_m + r_l. The scale goes into B. For PEFT,
    heads and biases are copied. Other programs have no place for them: that is an error, or a warning with
    --ignore-unknown. Adapters that equal no plain LoRA (DoRA, LoHa, LoKr, full fine-tuning) are refused.
    """
    from msplora_analysis.write.concatenate import exported
    from msplora_analysis.write.targets import find_target, targets

    if to not in targets():
        raise typer.BadParameter(f"{to!r} is not one of {', '.join(targets())}.", param_hint="--to")
    table, source, chosen = exported(adapter, out, to, base, dtype, overwrite, Options(ignore_unknown, semantics.value))
    with terminal.closed_pipe_ignored():
        groups = [
            [module, str(len(rows)), terminal.span(rows["rank"]), f"{rows['parameters'].sum():,}"]
            for module, rows in terminal.by_module(table)
        ]
        print(terminal.plain_table(["module", "number", "rank", "parameters"], groups), end="\n\n")
        what = find_target(to).what
        print(f"parameters: {source.parameters:,} in the file, {table['parameters'].sum():,} as {what} ({chosen})")
        terminal.print_paths([out])
