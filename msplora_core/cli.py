"""The command ``msplora-train``. Heavy libraries are imported only once there is something to train."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

import typer

from msplora_core import __version__
from msplora_core.data.tasks import EMBEDDED_TASK, TASKS, Task, get_task
from msplora_core.errors import TrainingError
from msplora_core.methods import METHODS, methods_table
from msplora_core.run.distributed import is_writer, leave
from msplora_core.run.settings import MODEL_DTYPES, PRECISIONS, Settings, make_settings, parse_ranks
from msplora_core.train.models import EMBEDDED_MODELS

_PATIENCE = 5.0
"""Seconds that a process other than the writing one waits before it tells of an error of its own."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help starts in less than half the time of rich help.
    rich_markup_mode=None,
    # Without a value here, `--help` makes typer import pydantic to check that none is given.
    context_settings={"default_map": {"help": False}},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"msplora {__version__}")
        raise typer.Exit


@app.command(
    epilog=f"""Methods:

\b
{indent(methods_table(), "  ")}

Examples:

\b
  msplora-train --output-dir runs/first     (embedded model and task: no network, no data)
  msplora-train --model FacebookAI/roberta-base --task cola --rank 8 --output-dir runs/cola
  msplora-train --task mrpc --data-dir glue --method lora --seed 1 --output-dir runs/mrpc
  msplora-train --model smollm2 --task alpaca --data-dir data --output-dir runs/alpaca
""",
)
def train(
    output_dir: Annotated[Path, typer.Option(help="Folder of the run: one checkpoint for every epoch.")],
    model: Annotated[
        str,
        typer.Option(help=f"Hub name, model folder or .gguf file; embedded: {', '.join(EMBEDDED_MODELS)}."),
    ] = "minilm",
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = EMBEDDED_TASK,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}; see below.")] = "msplora",
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with {task}_train.jsonl[.gz] and {task}_validation.jsonl[.gz]; else the Hub."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation, order and dropout.")] = 0,
    rank: Annotated[
        int | None,
        typer.Option(
            help="LoRA's rank, or MSPLoRA's r: global r, mid r/2, layer r/4.  "
            "[default: 8; alpaca: 64; lily: 4 times as much]"
        ),
    ] = None,
    ranks: Annotated[str | None, typer.Option(help="MSPLoRA's ranks global,mid,layer, such as 8,8,8.")] = None,
    bottleneck: Annotated[int | None, typer.Option(help="Width of bottleneck adapters.  [default: 16]")] = None,
    dropped_layers: Annotated[
        int | None,
        typer.Option(
            help="Lowest layers without a bottleneck adapter.  [default: none, and a random number in every step]"
        ),
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Modules to adapt, comma-separated.  [default: as PEFT's LoRA: query,value in BERT]"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="[default: the task's recipe]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: the task's recipe; fft: 2e-5]")] = None,
    head_learning_rate: Annotated[
        float | None, typer.Option(help="[default: half the learning rate; fft: all of it]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="[default: the task's recipe]")] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(help="Examples computed at once.  [default: the task's recipe: the whole batch; alpaca: 4]"),
    ] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="[default: the task's recipe]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[default: the task's recipe]")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens.  [default: the task's recipe]")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="[default: the task's recipe]")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="[default: the task's recipe]")] = None,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "fp32",
    model_dtype: Annotated[
        str, typer.Option(help=f"Type of the base model's weights, one of {', '.join(MODEL_DTYPES)}.")
    ] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, slower: activations are computed twice.")
    ] = False,
    save_steps: Annotated[
        int | None, typer.Option(help="Also keep a checkpoint every so many steps, the newest only.")
    ] = None,
    shard_base: Annotated[
        bool, typer.Option("--shard-base", help="Spread the base model over the processes of torchrun (FSDP2).")
    ] = False,
    log_spectra: Annotated[
        bool, typer.Option("--log-spectra", help="Log effective rank, M_eff-k, norms and scale overlap with the loss.")
    ] = False,
    report_to: Annotated[
        str | None, typer.Option(help="Tracker to report to: tensorboard, wandb, trackio, mlflow, ...")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in the folder first.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train an adapter, with MSPLoRA or another method, keeping its checkpoint before training and of every epoch.

    The run folder is a Hugging Face Trainer output folder; look into it with `msplora-analyze spectra`.
    """
    settings = make_settings(
        model=model,
        task=task,
        method=method,
        output_dir=output_dir,
        data_dir=data_dir,
        seed=seed,
        rank=rank,
        ranks=None if ranks is None else parse_ranks(ranks),
        bottleneck=bottleneck,
        dropped_layers=dropped_layers,
        target_modules=None if target_modules is None else target_modules.split(","),
        epochs=epochs,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        max_length=max_length,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        precision=precision,
        model_dtype=model_dtype,
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        shard_base=shard_base,
        log_spectra=log_spectra,
        report_to=report_to,
        resume=resume,
        overwrite=overwrite,
        progress_bar=sys.stderr.isatty(),
    )
    _quiet_libraries()
    try:
        from msplora_core.train import training
    except ModuleNotFoundError as error:
        raise TrainingError(f"training needs the package {error.name}; run: pip install 'msplora[train]'") from error
    except KeyboardInterrupt as stop:
        raise _stopped(stop, "nothing was written yet") from None
    try:
        results = training.train(settings)
    except KeyboardInterrupt as stop:
        raise _stopped(stop, f"what {output_dir} has is whole; continue with the same command and --resume") from None
    if is_writer():
        _print_results(results, get_task(task), settings)
    leave()


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it: treated as Ctrl-C is, so that nothing half-written stays behind."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _stopped(stop: KeyboardInterrupt, state: str) -> typer.Exit:
    if is_writer():
        print(f"stopped: {state}", file=sys.stderr)
    return typer.Exit(143 if isinstance(stop, _Terminated) else 130)


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what PEFT calls there
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells of kernels that could be downloaded
    # PEFT looks whether the vocabulary was resized, and cannot for a GGUF file; it never is here
    warnings.filterwarnings("ignore", message="Could not find a config file")


def _print_results(results: list[Any], task: Task, settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    metric = task.metric
    best = (max if task.greater_is_better else min)(results, key=lambda result: result.metric)
    table = Table("epoch", "step", "train loss", "validation loss", metric, title="Results", title_justify="left")
    for column in table.columns:
        column.justify = "right"
    for result in results:
        train_loss = "-" if result.train_loss is None else f"{result.train_loss:.4f}"
        table.add_row(
            str(result.epoch),
            str(result.step),
            train_loss,
            f"{result.validation_loss:.4f}",
            f"{result.metric:.4f}",
            style="bold" if result is best else None,
        )
    console = Console()
    console.print(table)
    console.print(f"Best {metric} {best.metric:.4f} in epoch {best.epoch} (checkpoint-{best.step}).", highlight=False)
    run, how = settings.output_dir, METHODS[settings.method].spectra
    if how is not None:
        command = f"msplora-analyze spectra {run}{how.format(run=run)} --out {run}/analysis"
        console.print(f"Next: {command}", highlight=False)


def main() -> None:
    """Run the command; bad input ends in one line on standard error and exit status 1, Ctrl-C in 130 (SIGTERM: 143)."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except TrainingError as error:
        message = str(error)
    except OSError as error:  # whatever no module foresaw, such as a full disk
        message = f"{error.filename or 'system'}: {error.strerror or error}"
    if not is_writer():
        _let_the_launcher_end_this()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def _let_the_launcher_end_this() -> None:
    # What goes wrong in one process mostly does in all, and is told by the writing one; a launcher ends the others.
    try:
        time.sleep(_PATIENCE)
    except KeyboardInterrupt:
        sys.exit(1)


if __name__ == "__main__":
    main()
