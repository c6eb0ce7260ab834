"""``msplora-measure ablate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from msplora_core.errors import TrainingError
from msplora_core.measure.commands.shared import Adapter, BatchSize, DataDir, Model, Task, measuring

EXAMPLES = (
    "msplora-measure ablate runs/cola",
    "msplora-measure ablate runs/cola --ranks 1,2,4,8 --out ablation --format csv",
    "msplora-measure ablate adapter --model FacebookAI/roberta-base --task mrpc --data-dir glue --out ablation",
)


def ablate(
    adapter: Adapter,
    out: Annotated[Path | None, typer.Option(help="Folder of the table.  [default: the adapter's own]")] = None,
    data_dir: DataDir = None,
    model: Model = None,
    task: Task = None,
    ranks: Annotated[str, typer.Option(help="Ranks that every module is cut to, comma-separated.")] = "1,2,4",
    format: Annotated[str, typer.Option(help="Of the table: parquet or csv.")] = "parquet",
    batch_size: BatchSize = None,
) -> None:
    """Measure what each part of an adapter is worth: leave it out, and compare metric, loss and KL.

    Leaves out each module, layer, type of module and scale; keeps each scale alone; and cuts all modules to lower
    ranks, by their singular values and, with moments, by the task-weighted ones. The model runs over the validation
    examples once for each cut, with the trained head. A second call continues an interrupted one.
    """
    chosen = _ranks(ranks)
    with measuring(batch_size, "the same command goes on from what was measured"):
        from tqdm.auto import tqdm

        from msplora_core.measure.ablation_folder import FORMATS, ablate_to
        from msplora_core.measure.loading import load_subject

        if format not in FORMATS:
            raise TrainingError(f"format={format}: expected one of {', '.join(FORMATS)}")
        if out is not None and out.exists() and not out.is_dir():
            raise TrainingError(f"out={out}: is a file; expected a folder")
        subject = load_subject(adapter, data_dir=data_dir, model=model, task=task)
        with tqdm(desc="Ablating", unit="pass", disable=not sys.stderr.isatty()) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            path = ablate_to(
                out or subject.adapter,
                subject,
                ranks=chosen,
                format=format,
                batch_size=batch_size,
                say=lambda line: tqdm.write(line, file=sys.stderr),
                progress=progress,
            )
    print(path)


def _ranks(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise TrainingError(f"ranks={text}: expected whole numbers of at least 1, such as 1,2,4")
    return sorted({int(part) for part in parts})
