"""The command ``msplora-train``. Heavy libraries are imported only once there is something to train."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from shlex import quote
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msplora_core.data.tasks import get_task, recipes_table
from msplora_core.errors import TrainingError
from msplora_core.methods import method_options, methods_table
from msplora_core.options import Field, options_of
from msplora_core.run.console import Version, make_app, quiet_libraries, run, spelled, stopped
from msplora_core.run.distributed import is_writer, leave
from msplora_core.run.settings import Settings, make_settings

if TYPE_CHECKING:
    from msplora_core.train.training import EpochResult

app = make_app()


def _parameters() -> Iterator[inspect.Parameter]:
    """The command's options: those of settings and, behind ``--method``, those of the methods."""
    for name, field in options_of(Settings).items():
        if name == "method":
            yield _parameter(name, field._replace(type=str, default=field.default.name))
            for own, (type_, option, default) in method_options().items():
                told = "" if default is None else f"  [default: {default}]"
                # None where it is not given, so that one given to another method is told
                yield _parameter(own, Field(type_, replace(option, help=option.help + told), None))
        else:
            yield _parameter(name, field)
    yield inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Version)


def _parameter(name: str, field: Field) -> inspect.Parameter:
    type_: Any = str if field.option.parse else field.type
    # the name alone: else typer makes a --no-... of every switch
    option = typer.Option(spelled(name), help=field.option.help)
    type_ = type_ | None if field.default is None else type_
    annotation: Any = Annotated[type_, option]
    default = inspect.Parameter.empty if field.default is ... else field.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def train(**given: Any) -> None:
    """Train an adapter, with MSPLoRA or another method. Keeps a checkpoint before training and of every epoch.

    The run folder is a Hugging Face Trainer output folder. `msplora-analyze RUN` tells what it learned.
    """
    del given["version"]
    for name, (_, option, _) in (options_of(Settings) | method_options()).items():
        if option.parse is not None and given[name] is not None:
            given[name] = option.parse(given[name])
    settings = make_settings(**given, progress_bar=sys.stderr.isatty())
    quiet_libraries()
    state = "nothing was written yet"
    try:
        from msplora_core.train import training

        state = f"what {settings.output_dir} has is whole; continue with the same command and --resume"
        results = training.train(settings)
    except ModuleNotFoundError as error:
        raise TrainingError(f"training needs the package {error.name}; run: pip install 'msplora[train]'") from error
    except KeyboardInterrupt as stop:
        raise stopped(stop, state) from None
    if is_writer():
        _print_results(results, settings)
    leave()


train.__signature__ = inspect.Signature(list(_parameters()))  # type: ignore[attr-defined]
app.command(
    epilog=f"""Methods:

\b
{indent(methods_table(), "  ")}

Defaults by the task:

\b
{indent(recipes_table(), "  ")}

Examples:

\b
  msplora-train --output-dir runs/first     (embedded model and task: no network, no data)
  msplora-train --model FacebookAI/roberta-base --task cola --rank 8 --output-dir runs/cola
  msplora-train --task mrpc --data-dir glue --method lora --seed 1 --output-dir runs/mrpc
  msplora-train --model smollm2 --task alpaca --data-dir data --output-dir runs/alpaca
"""
)(train)


def _print_results(results: list[EpochResult], settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    task = get_task(settings.task)
    metric = task.metric
    last_cut = max(settings.method.cuts(results[-1].step), default=0)  # what is before is of a higher rank
    of_rank = [result for result in results if result.step >= last_cut]
    best = (max if task.greater_is_better else min)(of_rank, key=lambda result: result.metric)
    columns = (Column(name, justify="right") for name in ("epoch", "step", "train loss", "validation loss", metric))
    table = Table(*columns, title="Results", title_justify="left")
    for result in results:
        numbers = (result.train_loss, result.validation_loss, result.metric)
        cells = ("-" if number is None else f"{number:.4f}" for number in numbers)
        table.add_row(str(result.epoch), str(result.step), *cells, style="bold" if result is best else None)
    console = Console()
    console.print(table)
    console.print(f"Best {metric} {best.metric:.4f} in epoch {best.epoch} (checkpoint-{best.step}).", highlight=False)
    run, how = quote(str(settings.output_dir)), settings.method.spectra
    if how is not None:
        command = f"msplora-analyze spectra {run}{how.format(run=run)} --out {run}/analysis"
        console.print(f"Next: {command}", highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Run the command; bad input ends in one line on standard error and exit status 1, Ctrl-C in 130 (SIGTERM: 143)."""
    run(app, options_of(Settings) | method_options())


if __name__ == "__main__":
    main()
