"""``msplora-analyze relate``: two adapters or hundreds: are they alike, and do they add up or fight?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.options import Options
from msplora_analysis.tables.rows import rows_of

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 10  # modules, or pairs of adapters
_COLUMNS = {  # of two adapters; of many the first and the last three
    "cosine": "cosine",
    "norm_a": "norm\nof a",
    "norm_b": "of b",
    "norm_sum": "of\na + b",
    "overlap_in": "overlap\nin",
    "overlap_out": "overlap\nout",
    "expected_in": "by\nchance",
}
_COSTS = {"predicted_kl_a": "cost\nto a", "predicted_kl_b": "cost\nto b"}  # where they are known
_OF_MANY = ("cosine", "overlap_in", "overlap_out", "expected_in")


@command(
    "Relate adapters: are two alike, do they add up or fight, which of many belong together?",
    examples=(
        "msplora-analyze relate style-a style-b.safetensors --out relations",
        "msplora-analyze relate runs/* --out relations --figure png",
        "msplora-analyze relate runs/cola/lora-8 --out moved        # the checkpoints of one run",
    ),
)
def relate(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="Adapters of one base model, in any formats: folders or files, run folders (the last checkpoint "
            "each; of one run alone all), or folders of such.",
            show_default=False,
        ),
    ],
    out: arguments.Out,
    format: arguments.Format = arguments.TableFormat.parquet,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Overlaps compare the first K directions at most.  [default: the smaller rank of the two]",
            show_default=False,
        ),
    ] = None,
    figure: Annotated[
        list[arguments.FigureFormat] | None,
        typer.Option(metavar="pdf|png|svg", help="Also draw how they relate; may be repeated.", show_default=False),
    ] = None,
    style: arguments.StyleOption = None,
    base: arguments.Base = None,
    semantics: arguments.SemanticsChoice = arguments.Semantics.paper,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Compare the updates of every two adapters, for each module and in total.

    Prints whether two adapters add to each other, fight, or hardly touch; the modules with the largest cosines of
    either sign; and modules that only one has. For more than two, it prints which are most alike and which belong
    together. After msplora-measure added, it also tells what adding one costs the task of another.
    DIR/relations.FORMAT has a row for each module of each two.
    """
    arguments.check_style(style, figure)
    from msplora_analysis.tables.files import write_table
    from msplora_analysis.tables.relations import labelled, related

    found = labelled(adapters, full=base is not None)
    arguments.make_folder(out)
    options = Options(ignore_unknown, semantics.value, base, top_k)
    with terminal.progress_bar("Relating") as progress:
        table = related(found, options, progress)
    written = [out / f"relations.{format.value}"]
    write_table(table, written[0])
    if figure:
        from msplora_analysis.show.figures.relations import plots

        for plot in plots(table):
            written += plot.write(out, [kind.value for kind in figure], style)
    with terminal.closed_pipe_ignored():
        _print(table)
        terminal.print_paths(written)


def _print(table: pd.DataFrame) -> None:
    from msplora_analysis.ask.relations import sentences
    from msplora_analysis.tables.relations import ALL

    for sentence in sentences(table):
        terminal.say(sentence)
    print()
    whole = table[table["module"] == ALL]
    two = len(whole) == 1
    rows = table[table["module"] != ALL] if two else whole
    first = rows_of(rows.reindex(rows["cosine"].abs().sort_values(ascending=False).index[:_SHOWN]))
    shown = [
        *(_COLUMNS if two else _OF_MANY),
        *(name for name in _COSTS if name in whole and whole[name].notna().any()),
    ]
    if two:
        names = [[name] for name in [*_without_common_start([row["name"] for row in first]), ALL]]
        first += rows_of(whole)
    else:
        names = [[row["a"], row["b"]] for row in first]
    cells = [
        [*own, *("-" if math.isnan(row[name]) else f"{row[name]:.3g}" for name in shown)]
        for own, row in zip(names, first, strict=True)
    ]
    headers = [*(["module"] if two else ["a", "b"]), *((_COLUMNS | _COSTS)[name] for name in shown)]
    print(terminal.plain_table(headers, cells), end="\n\n")
    if len(rows) > _SHOWN:
        what = "modules" if two else "pairs"
        terminal.say(f"the {_SHOWN} {what} of largest cosine, of {len(rows)}; all are in the table")
    for label, alone in table.attrs["unmatched"].items():
        more = ", ..." if len(alone) > 3 else ""
        terminal.say(f"only in {label} ({len(alone)}): {', '.join(alone[:3])}{more}")


def _without_common_start(names: list[str]) -> list[str]:
    """Paths without the components that all begin with."""
    paths = [name.split(".") for name in names]
    common = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), 0)
    return [".".join(path[common:]) for path in paths]
