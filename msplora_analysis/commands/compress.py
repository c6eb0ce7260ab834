"""``msplora-analyze compress``: an adapter as a plain PEFT LoRA adapter of lower rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Options

if TYPE_CHECKING:
    import pandas as pd

    from msplora_analysis.write.truncate import Compressed


@command(
    "Write the best approximation of an adapter by a plain PEFT LoRA adapter of lower rank.",
    examples=(
        "msplora-analyze compress runs/lora-64/checkpoint-500 --out small --energy 0.9",
        "msplora-analyze compress runs/lora-64/checkpoint-500 --out small --rank 8",
        "msplora-analyze compress runs/msplora/checkpoint-270 --out small --budget 73728",
        "msplora-analyze compress runs/msplora/checkpoint-270 --out small --kl 0.01",
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
    kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Keep the fewest parameters whose predicted KL of the outputs stays below, in nats an example; "
            "needs moments.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        arguments.Weights | None,
        typer.Option(
            metavar="moments|none",
            help="What is best: in the metric of the task, by moments; or in Frobenius norm.  "
            "[default: moments, where they are]",
            show_default=False,
        ),
    ] = None,
    moments: arguments.Moments = None,
    dtype: Annotated[str | None, arguments.factor_type("float32; float64 for an adapter in float64")] = None,
    overwrite: arguments.Overwrite = False,
    semantics: arguments.SemanticsChoice = arguments.Semantics.paper,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Write the best approximation of an adapter by a plain PEFT LoRA of lower rank.

    Give one of --energy, --rank, --budget and --kl. The result is the truncated singular value decomposition of
    every update, computed from its factors. If the adapter has moments (msplora-measure moments), the task-weighted
    update is decomposed. Prints what is kept, the error, and with moments the predicted KL of the outputs.
    DIR/ranks.csv has a row for each module. Only an evaluation tells what happens to the metric.
    """
    if sum(choice is not None for choice in (energy, rank, budget, kl)) != 1:
        raise typer.BadParameter("give one of the four", param_hint="--energy, --rank, --budget, --kl")
    from msplora_analysis.compute.choose import Choice
    from msplora_analysis.write.truncate import compressed

    options = Options(ignore_unknown, semantics.value, moments=moments)
    choice = Choice(energy, rank, budget, kl)
    done = compressed(adapter, out, choice, weights and weights.value, dtype, overwrite, options)
    table = done.table
    with terminal.closed_pipe_ignored():
        headers = ["module", "number", "rank", "rank\nkept", "parameters", "parameters\nkept", "energy\nkept", "error"]
        if "task_norm" in table:  # in the place of what the last line says too, to fit into 80 letters
            headers = [head for head in headers if head != "parameters"] + ["task energy\nkept", "task\nerror"]
        groups = [[name, *_cells(rows)] for name, rows in terminal.by_module(table)]
        print(terminal.plain_table(headers, groups), end="\n\n")
        if table["rank"].equals(table["rank_before"]):
            terminal.say("nothing was left out: no update has a higher rank than is kept")
        dropped = table.loc[table["rank"] == 0, "name"]
        if len(dropped):
            more = ", ..." if len(dropped) > 3 else ""
            terminal.say(f"left out, as rank 0 is kept of them ({len(dropped)}): {', '.join(dropped[:3])}{more}")
        terminal.say(f"best in {'the metric of the task, by moments' if done.by_task else 'Frobenius norm'}")
        _say_prediction(done)
        terminal.say(
            f"parameters: {done.source.parameters:,} in the file, {table['parameters'].sum():,} kept ({done.dtype})"
        )
        terminal.print_paths([out])


def _say_prediction(done: Compressed) -> None:
    from msplora_analysis.ask.advice.calibrated import in_words

    predicted = done.table.attrs.get("predicted_kl")
    if predicted is None:
        return
    unseen = ""
    if done.by_kl:
        unseen = ", on the half of the examples that the choice did not see "
        unseen += f"({done.by_kl.on_chosen:.3g} on the half that it saw)"
    terminal.say(f"predicted KL: {predicted:.3g} nats an example{unseen}")
    leaves_out = bool((done.table["rank"] == 0).any())
    terminal.say(in_words(predicted, leaves_out=leaves_out, regression=done.regression))


def _cells(rows: pd.DataFrame) -> list[str]:
    """Number, ranks, parameters, energies, and errors relative to the norm of all of the rows together."""
    shares = []
    for prefix in ("", "task_") if "task_norm" in rows else ("",):
        norm, error = rows[f"{prefix}norm"], rows[f"{prefix}error"]
        total = float((norm**2).sum())
        shares.append(float(((norm * error) ** 2).sum()) / total if total else 0.0)
    return [
        str(len(rows)),
        terminal.span(rows["rank_before"]),
        terminal.span(rows["rank"]),
        *([] if "task_norm" in rows else [f"{rows['parameters_before'].sum():,}"]),
        f"{rows['parameters'].sum():,}",
        *(text for share in shares for text in (f"{1 - share:.2%}", f"{share**0.5:.3g}")),
    ]
