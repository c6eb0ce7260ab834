"""``msplora-analyze redundancy``: how much the layers, and the scales of MSPLoRA, share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.errors import AnalysisError
from msplora_analysis.options import Execution, Options
from msplora_analysis.tables.rows import rows_of

if TYPE_CHECKING:
    import pandas as pd


_SHOWN = {  # column -> its header on the terminal
    "overlap_in": "overlap\nin",
    "overlap_out": "overlap\nout",
    "overlap_expected": "by\nchance",
    "cosine": "cosine",
    "js": "Jensen-\nShannon",
}


_KINDS = ("adjacent", "across", "same_layer")


@command(
    "Write tables: what layers share (spectra, directions), and how decoupled scales are.",
    examples=(
        "msplora-analyze redundancy runs/cola --out tables",
        "msplora-analyze redundancy runs --out tables --top-k 4 --format csv",
        "msplora-analyze redundancy runs/cola/lora-8 --out tables --nulls --figure png    # of three seeds or more",
    ),
)
def redundancy(
    paths: arguments.Paths,
    out: arguments.Out,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Compare the first K singular directions at most.  [default: the smaller numerical rank of a pair]",
            show_default=False,
        ),
    ] = None,
    details: Annotated[
        bool,
        typer.Option("--details", help="Add columns: places, K, and chance on either side with its deviation."),
    ] = False,
    nulls: Annotated[
        bool,
        typer.Option(
            "--nulls", help="Beside null models too: other seeds, random directions, layers rotated at random."
        ),
    ] = False,
    figure: Annotated[
        list[arguments.FigureFormat] | None,
        typer.Option(metavar="pdf|png|svg", help="Also draw the null models; may be repeated.", show_default=False),
    ] = None,
    style: arguments.StyleOption = None,
    format: arguments.Format = arguments.TableFormat.parquet,
    workers: arguments.Workers = None,
    dask: arguments.Dask = None,
    base: arguments.Base = None,
    moments: arguments.Moments = None,
    semantics: arguments.SemanticsChoice = arguments.Semantics.paper,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Compare the weight updates of every two layers, and of the scales within each layer.

    Writes DIR/pairs.FORMAT: one row per pair of layers, with divergences of their spectra, overlap of their
    singular directions beside chance, and cosine. For MSPLoRA it also writes DIR/scales.FORMAT, one row per layer
    and pair of scales. Prints means of the last checkpoint of each run.

    With --nulls it answers whether layers are redundant. It compares what they share with runs of other seeds, and
    writes DIR/nulls, nulls_pairs and joint.FORMAT.
    """
    if figure and not nulls:
        raise AnalysisError("--figure draws the null models: add --nulls")
    arguments.check_style(style, figure)
    arguments.make_folder(out)
    from msplora_analysis.tables.files import write_table
    from msplora_analysis.tables.pair_means import summary
    from msplora_analysis.tables.pairs import Tables, read_redundancy

    options = Options(ignore_unknown, semantics.value, base, top_k, moments)
    with terminal.progress_bar("Comparing") as progress:
        tables = read_redundancy(paths, options, Execution(workers, dask, progress=progress), details=details)
    if tables.pairs.empty and tables.scales.empty:
        listed = ", ".join(paths[:3])
        raise AnalysisError(
            f"{listed}: nothing to compare: no two layers of one stack with a module of one name and shape"
        )
    written = [out / f"{name}.{format.value}" for name in Tables._fields]
    for table, path in zip(tables, written, strict=True):
        write_table(table, path)
    found = None
    if nulls:
        from msplora_analysis.ask.nulls import read_nulls

        with terminal.progress_bar("Null models") as progress:
            found = read_nulls(paths, options, progress)
        for table, name in zip(found, ("nulls", "nulls_pairs", "joint"), strict=True):
            written.append(out / f"{name}.{format.value}")
            write_table(table, written[-1])
        if figure:
            from msplora_analysis.show.figures import joint_basis
            from msplora_analysis.show.figures import nulls as null_models

            for plot in (*null_models.plots(found.summary), *joint_basis.plots(found.joint)):
                written += plot.write(out, [kind.value for kind in figure], style)
    with terminal.closed_pipe_ignored():
        _print(summary(tables.pairs, tables.scales))
        if found is not None:
            _print_nulls(found.summary, found.joint)
        terminal.print_paths(written)


def _print(means: pd.DataFrame) -> None:
    from msplora_analysis.tables.labels import when

    for run, rows in means.groupby("run", sort=False):
        at = when(rows_of(rows.head(1))[0])
        print(f"{terminal.bold(str(run))}: means over pairs and modules{at and f', {at}'}")
        cells = [
            [row["between"], str(row["pairs"]), *("-" if math.isnan(row[n]) else f"{row[n]:.3g}" for n in _SHOWN)]
            for row in rows_of(rows)
        ]
        print(terminal.plain_table(["between", "pairs", *_SHOWN.values()], cells), end="\n\n")


def _print_nulls(table: pd.DataFrame, joint: pd.DataFrame) -> None:
    heads = ("part", "measure", "neighbours,\none run", "neighbours,\ntwo runs", "one layer,\ntwo runs", "by\nchance")
    for method, rows in table.groupby("method", sort=False):
        first = rows_of(rows)[0]
        print(f"{terminal.bold(str(method))}: {first['runs']} runs, tasks: {first['tasks']}")
        cells = []
        for row in rows_of(rows):
            values = ["-" if math.isnan(row[n]) else f"{row[n]:.3f}" for n in (*_KINDS, "chance", "normalised")]
            if not math.isnan(row["low"]):
                values[-1] += f" ({row['low']:.2f}, {row['high']:.2f})"
            cells.append([row["part"], row["measure"], *values])
        print(terminal.plain_table([*heads, "of what one\nlayer shares"], cells), end="\n\n")
        mine = joint[joint["method"] == method].groupby(["part", "energy"], sort=False)
        sums = rows_of(mine[["joint", "rotated", "separate"]].sum().reset_index())
        cells = [
            [
                row["part"],
                f"{row['energy']:.0%}",
                *(f"{row['joint'] / row[n]:.3f}" for n in ("rotated", "separate")),
            ]
            for row in sums
        ]
        by = ["part", "energy", "one basis /\nrotated layers", "one basis /\na pair each"]
        print(terminal.plain_table(by, cells), end="\n\n")
