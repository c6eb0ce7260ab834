"""``msplora-analyze compare``: two methods, with intervals."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from msplora_analysis.commands.shared import arguments, terminal
from msplora_analysis.commands.shared.declaring import command
from msplora_analysis.commands.shared.values import PlainCommand
from msplora_analysis.errors import AnalysisError
from msplora_analysis.options import NO_MOMENTS, Execution, Options


class Averaging(str, Enum):
    spectra = "spectra"
    divergences = "divergences"


class Claim(str, Enum):
    runs = "runs"
    tasks = "tasks"


class _Several(PlainCommand):
    """``--with`` takes all paths up to the next option, so that a shell's pattern may stand there."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        inside = False
        for arg in args:
            if arg.startswith("-"):
                inside = arg.partition("=")[0] == "--with"
                spread += [] if arg == "--with" else [arg]
            else:
                spread += ["--with", arg] if inside else [arg]
        return super().parse_args(ctx, spread)


@command(
    "Compare two methods: do layers differ more, by how much, beyond chance?",
    examples=(
        "msplora-analyze compare runs/*/msplora-8-8-8 --with runs/*/lora-8 --out comparison",
        "msplora-analyze compare runs/msplora --with runs/lora --out comparison --average divergences",
        'msplora-analyze compare spectra.parquet --method "MSPLoRA 8/8/8" \\\n'
        '      --with spectra.parquet --with-method "LoRA r=8" --out comparison',
    ),
    kind=_Several,
)
def compare(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="A...", help="Runs of one method, or a spectra table.", show_default=False),
    ],
    other: Annotated[
        list[str],
        typer.Option("--with", metavar="B...", help="Runs of the other, or a spectra table.", show_default=False),
    ],
    out: arguments.Out,
    format: arguments.Format = arguments.TableFormat.parquet,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of A, take this method, such as 'LoRA r=8'.", show_default=False),
    ] = None,
    with_method: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of B, take this method.", show_default=False)
    ] = None,
    average: Annotated[
        Averaging,
        typer.Option(
            metavar="spectra|divergences",
            help="Average spectra over runs and modules and then compare layers, as the paper; or the reverse.",
        ),
    ] = Averaging.spectra,
    claim: Annotated[
        Claim,
        typer.Option(metavar="runs|tasks", help="Whether to speak of these tasks, or of tasks like them (6 or more)."),
    ] = Claim.runs,
    margin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MEASURE=]M",
            help="Test whether differences are below M: of all measures, or of one (kl, js, overlap_in, ...). "
            "May be repeated.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print a sentence for each row of the table too.")] = False,
    epoch: Annotated[
        float | None, typer.Option(metavar="E", help="Compare at this epoch.  [default: the last that all share]")
    ] = None,
    stack: Annotated[
        str | None, typer.Option(metavar="NAME", help="The numbered layers to compare, if a model has several.")
    ] = None,
    confidence: Annotated[float, typer.Option(metavar="P", help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(metavar="N", help="Of random relabelling, above 15 pairs of runs.")] = 0,
    figure: Annotated[
        list[arguments.FigureFormat] | None,
        typer.Option(metavar="pdf|png|svg", help="Also draw the differences; may be repeated.", show_default=False),
    ] = None,
    style: arguments.StyleOption = None,
    workers: arguments.Workers = None,
    cache: arguments.UseCache = True,
    ignore_unknown: arguments.IgnoreUnknown = False,
) -> None:
    """Compare two methods by how much their layers differ: one verdict, and a forest plot.

    Of comparisons of equal methods, at most 5 % decide anything. With fewer than six pairs of runs, nothing is
    decided. Runs are paired by task and seed, where run.json or their names tell these. DIR/comparison.FORMAT has
    every number. Overlaps of directions are compared for runs, and for tables with a pairs table beside them.
    """
    from msplora_analysis.ask.comparison.compare import compare as compared
    from msplora_analysis.ask.comparison.sides import load_sides
    from msplora_analysis.ask.comparison.statements import forest, sentences, verdict
    from msplora_analysis.tables.files import write_table

    arguments.check_style(style, figure)
    arguments.make_folder(out)
    with terminal.progress_bar("Reading") as progress:
        options, execution = (
            Options(ignore_unknown, moments=NO_MOMENTS),
            Execution(workers, cache=cache, progress=progress),
        )
        sides = load_sides(paths, other, method, with_method, options, execution, epoch=epoch)
    table = compared(
        *sides,
        averaging=average.value,
        claim=claim.value,
        margin=_margins(margin),
        epoch=epoch,
        stack=stack,
        confidence=confidence,
        seed=seed,
    )
    written = [out / f"comparison.{format.value}"]
    write_table(table, written[0])
    if figure:
        from msplora_analysis.show.figures.comparison import plots

        written += [
            path for plot in plots(table, None) for path in plot.write(out, [kind.value for kind in figure], style)
        ]
    with terminal.closed_pipe_ignored():
        print(verdict(table), "", *forest(table), "", sep="\n")
        if everything:
            print("\n\n".join(sentences(table)), end="\n\n")
        terminal.print_paths(written)


def _margins(given: list[str] | None) -> float | dict[str, float] | None:
    """'0.01' for all measures, 'js=0.01' for one; several of the latter."""
    named: dict[str, float] = {}
    for one in given or ():
        name, _, number = one.rpartition("=")
        try:
            named[name] = float(number)
        except ValueError:
            raise AnalysisError(f"--margin {one}: expected a number, or MEASURE=NUMBER such as js=0.01") from None
    if "" in named and len(named) > 1:
        raise AnalysisError("--margin: give one number for all measures, or MEASURE=NUMBER for each")
    return named.get("", named or None)
