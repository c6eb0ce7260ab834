"""``msplora-analyze merge``: several adapters as one plain LoRA."""

from __future__ import annotations

from typing import Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Options


@command(
    "Merge adapters of one base model into one plain PEFT LoRA.",
    examples=(
        "msplora-analyze merge style subject --out both --method cat        # the exact sum",
        "msplora-analyze merge style subject --out both --weight 1 --weight 0.6 --rank 32",
        "msplora-analyze merge loras/* --out all --method knots --density 0.3",
        "msplora-analyze merge runs/cola runs/mrpc --out small --method cat --kl 0.01    # with moments beside each",
    ),
)
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="Adapters of one base model, in any formats: folders or files of one adapter each.",
            show_default=False,
        ),
    ],
    out: arguments.NewAdapter,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="cat, svd, linear, ties, dare, knots, tsv, iso or lego.")
    ] = "svd",
    weight: Annotated[
        list[float] | None,
        typer.Option(metavar="W", help="Of each adapter, in their order; repeat it.  [default: 1]", show_default=False),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, metavar="R", help="Rank of the result, at most.", show_default=False)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="E", help="Share of the result's sum of sigma² that is kept.", show_default=False),
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="With --method cat: the fewest parameters whose predicted KL from the exact sum stays below, on the "
            "task of each adapter, by the moments beside each.",
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        float, typer.Option(metavar="D", help="Of ties, dare and knots: the share of entries that is kept.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(metavar="N", help="Of dare and lego.")] = 0,
    dtype: Annotated[str | None, arguments.factor_type("float32")] = None,
    overwrite: arguments.Overwrite = False,
    semantics: arguments.SemanticsChoice = arguments.Semantics.paper,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Merge adapters of one base model, by their factors, into one plain PEFT LoRA.

    Module names of different trainers are matched. A module that only some adapters have is merged from these. A
    head, or whatever else is saved beside the factors, comes from the first adapter. DIR/ranks.csv has a row for
    each module. Only an evaluation tells what happens to the tasks.
    """
    from msplora_analysis.compute.merging.protocol import Settings
    from msplora_analysis.errors import AnalysisError
    from msplora_analysis.write.merge import merged

    options, settings = Options(ignore_unknown, semantics.value), Settings(rank, energy, density, seed, kl)
    with terminal.progress_bar("Merging") as progress:
        try:
            done = merged(adapters, out, method, weight or None, settings, dtype, overwrite, options, progress)
        except AnalysisError as error:  # the option is called --weight
            raise AnalysisError(str(error).replace("weights=", "--weight "), *error.arguments) from None
    table = done.table
    with terminal.closed_pipe_ignored():
        headers = ["module", "number", "rank", "norm", "parameters"]
        groups = [
            [
                name,
                str(len(rows)),
                terminal.span(rows["rank"]),
                f"{float((rows['norm'] ** 2).sum()) ** 0.5:.4g}",
                f"{rows['parameters'].sum():,}",
            ]
            for name, rows in terminal.by_module(table)
        ]
        print(terminal.plain_table(headers, groups), end="\n\n")
        some = int((table["adapters"] < len(done.sources)).sum())
        if some:
            terminal.say(f"modules that not all {len(done.sources)} adapters have: {some} of {len(table)}")
        for source, nats in zip(done.sources, table.attrs.get("predicted_kl", []), strict=False):
            terminal.say(f"predicted KL on the task of {source.adapter.run}: {nats:.3g} nats an example")
        terminal.print_paths([out])
