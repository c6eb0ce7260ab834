"""Arguments and options that the commands share, and what they say of failures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from msplora_core.data.tasks import TASKS
from msplora_core.errors import TrainingError
from msplora_core.models import EMBEDDED_MODELS
from msplora_core.run.console import quiet_libraries, stopped

Adapter = Annotated[
    Path, typer.Argument(help="Checkpoint of a run, run folder (its last checkpoint), or any PEFT adapter.")
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder with {task}_train.jsonl[.gz] and {task}_validation.jsonl[.gz].  [default: as the run]"),
]
Model = Annotated[
    str | None,
    typer.Option(
        help=f"Hub name, model folder or .gguf file; embedded: {', '.join(EMBEDDED_MODELS)}.  [default: as the run]"
    ),
]
Task = Annotated[str | None, typer.Option(help=f"One of {', '.join(TASKS)}.  [default: as the run]")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Examples computed at once; the result is the same.  [default: 32; alpaca: 4]")
]


@contextmanager
def measuring(batch_size: int | None, state: str = "nothing was written") -> Iterator[None]:
    """For the length of a ``with``: libraries are quiet, and what stops the measurement is told in a line.

    Args:
        batch_size: What was given, for the error of a GPU that is full.
        state: What a measurement that is told to stop leaves behind.
    """
    quiet_libraries()
    try:
        yield
    except ModuleNotFoundError as error:
        raise TrainingError(f"measuring needs the package {error.name}; run: pip install 'msplora[train]'") from error
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        raise TrainingError(f"batch_size={batch_size or 'default'}: too much for the GPU's memory; lower it") from error
    except KeyboardInterrupt as stop:
        raise stopped(stop, state) from None
