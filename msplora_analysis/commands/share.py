"""``msplora-analyze share``: an adapter as the nearest MSPLoRA, and what its layers could share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Options

if TYPE_CHECKING:
    import pandas as pd

    from msplora_analysis.write.share import Shared

_BEYOND = 0.01  # of the energy: less than this beyond chance is called nothing


@command(
    "Write the nearest MSPLoRA to an adapter: what could its layers share?",
    examples=(
        "msplora-analyze share runs/lora/checkpoint-500 --out shared",
        "msplora-analyze share runs/lora/checkpoint-500 --out shared --ranks 8,4,2 --figure png",
    ),
)
def share(
    adapter: arguments.AdapterPath,
    out: arguments.NewAdapter,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="G,M,L",
            help="Ranks of the scales global, mid and layer; 0 for none.  "
            "[default: an MSPLoRA adapter's own; else r, r/2 and r/4 of the largest rank]",
            show_default=False,
        ),
    ] = None,
    groups: Annotated[int, typer.Option(min=1, metavar="N", help="Groups of layers of the mid scale.")] = 3,
    weights: Annotated[
        arguments.Weights,
        typer.Option(metavar="moments|none", help="Let a layer's error count by what the task makes of its update."),
    ] = arguments.Weights.none,
    moments: arguments.Moments = None,
    format: arguments.Format = arguments.TableFormat.parquet,
    figure: Annotated[
        list[arguments.FigureFormat] | None,
        typer.Option(metavar="pdf|png|svg", help="Also draw the layers; may be repeated.", show_default=False),
    ] = None,
    style: arguments.StyleOption = None,
    dtype: Annotated[str | None, arguments.factor_type("float32")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random directions.")] = 0,
    overwrite: arguments.Overwrite = False,
    semantics: arguments.SemanticsChoice = arguments.Semantics.paper,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Fit MSPLoRA's three scales to an adapter, and say what its layers could share.

    Writes the nearest MSPLoRA adapter, and DIR/sharing.FORMAT: how much energy of each layer, group and type of
    module is kept, with the global scale alone, with global and mid, and with all three. Beside it stands chance:
    what is kept of layers with the same singular values in random directions. An exported MSPLoRA comes back
    without error.
    """
    arguments.check_style(style, figure)
    from msplora_analysis.write.share import shared

    options = Options(ignore_unknown, semantics.value, moments=moments)
    with terminal.progress_bar("Fitting", "types of modules") as progress:
        done = shared(
            adapter, out, _parse(ranks), groups, weights.value, format.value, dtype, seed, overwrite, options, progress
        )
    written = [out]
    if figure:
        from msplora_analysis.show.figures.layers_share import plots

        formats = [kind.value for kind in figure]
        written += [path for plot in plots(done.table) for path in plot.write(out, formats, style)]
    with terminal.closed_pipe_ignored():
        _print(done)
        terminal.print_paths(written)


def _parse(ranks: str | None) -> list[int] | None:
    if ranks is None:
        return None
    texts = [text.strip() for text in ranks.split(",")]
    if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in texts) or len(texts) != 3:
        raise typer.BadParameter("expected three whole numbers, such as 8,4,2", param_hint="--ranks")
    return [int(text) for text in texts]


def _print(done: Shared) -> None:
    table = done.table[done.table["unit"] == "module"]
    headers = ["module", "scales", "parameters", "energy\nkept", "by\nchance", "without\nsharing", "error"]
    rows: list[list[str]] = []
    for row in table.to_dict("records"):
        shares = [f"{row[column]:.1%}" for column in ("energy", "chance", "unshared")]
        rows.append([row["module"], row["scales"], f"{row['parameters']:,}", *shares, f"{row['error']:.3g}"])
    print(terminal.plain_table(headers, rows), end="\n\n")
    for sentence in sentences(done):
        terminal.say(sentence)


def sentences(done: Shared) -> list[str]:
    """The answer in words."""
    table = done.table[done.table["unit"] == "module"]
    fits = list(dict.fromkeys(table["scales"]))
    common = table[table["scales"] == fits[-2]]
    energy, chance = _mean(common, "energy"), _mean(common, "chance")
    squares = common["norm"] ** 2
    deviation = (
        float(((squares * common["chance_deviation"]) ** 2).sum() ** 0.5 / squares.sum()) if squares.sum() else 0.0
    )
    beyond = energy - chance
    answer = (
        "nothing beyond chance" if beyond < max(_BEYOND, 3 * deviation) else f"{beyond:.1%} of the energy beyond chance"
    )
    whole = table[table["scales"] == fits[-1]]
    kept, unshared = _mean(whole, "energy"), _mean(whole, "unshared")
    scales = " and ".join(fits[-2].split("+"))
    found = [
        f"what could layers share? {answer}: {scales} parts keep {energy:.1%} of the updates' squared norm, and "
        f"{chance:.1%} of layers of the same singular values in random directions",
        f"as MSPLoRA {'/'.join(map(str, done.ranks))} the adapter has {done.parameters:,} parameters "
        f"({done.parameters_before:,} before) and keeps {kept:.2%}; without sharing, as many keep {unshared:.2%}",
    ]
    if "task_error" in whole:
        plain, weighted = _mean(whole, "task_error"), _mean(whole, "task_error_weighted")
        found.append(
            f"in the metric of the task its error is {plain:.3g} in the mean over types; {weighted:.3g} where layers "
            "count by what they are worth to the task"
        )
    return found


def _mean(rows: pd.DataFrame, column: str) -> float:
    """Over types of modules, each as its squared norm."""
    squares = rows["norm"] ** 2
    return float((squares * rows[column]).sum() / squares.sum()) if squares.sum() else 0.0
