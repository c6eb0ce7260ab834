"""``msplora-analyze extract``: the best LoRA of a full fine-tuning."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.errors import AnalysisError
from msplora_analysis.options import Options

if TYPE_CHECKING:
    import pandas as pd

    from msplora_analysis.write.extract import Extracted

_KEPT = "what is done is kept in {}; the same command goes on there"


@command(
    "Write the best LoRA of a full fine-tuning, from the model and its base.",
    examples=(
        "msplora-analyze extract tuned --base model --out adapter --rank 32",
        "msplora-analyze extract hf://owner/tuned --base hf://owner/model --out adapter --energy 0.9",
        "msplora-analyze extract tuned --base model --out adapter --rank 64 --modules-to-save embed_tokens,lm_head",
    ),
)
def extract(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The fine-tuned model: folder or file, of safetensors or PyTorch, in shards or not; local, "
            "hf://owner/name, or any fsspec address.",
            show_default=False,
        ),
    ],
    base: Annotated[str, typer.Option(metavar="BASE", help="The model before training, likewise.", show_default=False)],
    out: arguments.NewAdapter,
    rank: Annotated[
        int | None, typer.Option(min=1, metavar="R", help="Rank of every module.", show_default=False)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="E",
            help="Of every module the least rank that keeps this share of the sum of sigma².",
            show_default=False,
        ),
    ] = None,
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Save modules whose name ends so as they are, such as embed_tokens; may be repeated or a list.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str | None, arguments.factor_type("float32")] = None,
    device: arguments.Device = "cpu",
    overwrite: arguments.Overwrite = False,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Write the best LoRA of a full fine-tuning as a plain PEFT adapter.

    Give --rank or --energy. The adapter has the best approximation of what training changed in every linear layer;
    its error is within 1e-6 of the least possible at that rank. Embeddings, norms and biases are not part of it.
    The command prints how much they changed, and --modules-to-save saves them completely. An interrupted call
    continues when it is repeated; finished work is in DIR.unfinished. DIR/ranks.csv has a row for each tensor.
    """
    if (rank is None) == (energy is None):
        raise typer.BadParameter("give one of the two", param_hint="--rank, --energy")
    from msplora_analysis.compute.choose import Choice
    from msplora_analysis.write.extract import extracted
    from msplora_analysis.write.work import beside

    names = [name for value in modules_to_save or [] for name in value.split(",") if name]
    options = Options(ignore_unknown, base=base)
    try:
        with terminal.progress_bar("Extracting", "tensors") as progress:
            done = extracted(model, out, Choice(energy, rank), names, dtype, device, overwrite, options, progress)
    except AnalysisError as error:
        if "out" in error.arguments and beside(out).is_dir():  # a full disk, say
            raise AnalysisError(f"{error}; {_KEPT.format(beside(out))}", *error.arguments) from None
        raise
    except KeyboardInterrupt:
        print(f"interrupted: {_KEPT.format(beside(out))}", file=sys.stderr)
        raise SystemExit(130) from None
    with terminal.closed_pipe_ignored():
        _print(done)
        terminal.print_paths([out])


def _print(done: Extracted) -> None:
    table = done.table
    low, saved, left = (table[table["kept"] == kept] for kept in ("low rank", "whole", "left out"))
    headers = ["module", "number", "rank", "parameters", "relative\nchange", "energy\nkept", "error"]
    groups = [[name, *_cells(rows)] for name, rows in terminal.by_module(low)]
    print(terminal.plain_table(headers, groups), end="\n\n")
    lost = float(((low["norm"] * low["error"]) ** 2).sum())
    change, beside = float((low["norm"] ** 2).sum()), float((left["norm"] ** 2).sum())
    terminal.say(f"of all that changed and is not saved whole, {(change - lost) / (change + beside):.2%} is kept")
    if len(saved):
        terminal.say(f"saved whole ({len(saved)}): {_listed(saved['name'])}")
    if len(left):
        most = left.sort_values("norm", ascending=False, na_position="first")
        told = [f"{row.name} ({_change(row)})" for row in most.itertuples(index=False)]
        terminal.say(f"left out ({len(left)}), the largest changes first: {_listed(told)}")
        terminal.say("--modules-to-save takes such modules whole")
    if unchanged := int((table["kept"] == "unchanged").sum()):
        terminal.say(f"unchanged: {unchanged} tensors")
    if done.resumed:
        terminal.say(f"kept from an earlier call: {done.resumed} tensors")
    terminal.say(f"parameters: {low['parameters'].sum():,} of the LoRA ({done.dtype})")


def _change(row: Any) -> str:
    if row.norm != row.norm:
        return "not in the base"
    return f"changed by {row.relative:.2g} of its norm" if row.relative == row.relative else "zero in the base"


def _listed(names: pd.Series[str] | list[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _cells(rows: pd.DataFrame) -> list[str]:
    """Number, ranks, parameters; change, energy and error relative to the norm of all rows together."""
    square = float((rows["norm"] ** 2).sum())
    base = float(((rows["norm"] / rows["relative"]) ** 2).sum())
    lost = float(((rows["norm"] * rows["error"]) ** 2).sum()) / square
    return [
        str(len(rows)),
        terminal.span(rows["rank"]),
        f"{rows['parameters'].sum():,}",
        f"{(square / base) ** 0.5:.2g}" if base else "-",
        f"{1 - lost:.2%}",
        f"{lost**0.5:.3g}",
    ]
