"""Arguments and options that the commands share."""

from pathlib import Path
from typing import Annotated

import typer

from msplora_core.data.tasks import TASKS
from msplora_core.models import EMBEDDED_MODELS

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
