"""``msplora-measure moments``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from msplora_core.errors import TrainingError
from msplora_core.measure.commands.shared import BatchSize, DataDir, Model, Task, measuring
from msplora_core.run.distributed import by_writer, is_writer, leave

EXAMPLES = (
    "msplora-measure moments runs/cola/checkpoint-2144",
    "msplora-measure moments runs/cola/checkpoint-*            # each of them: what the task needs over the training",
    "msplora-measure moments runs/cola --examples 128 --labels given --out given.safetensors",
    "msplora-measure moments adapter --model FacebookAI/roberta-base --task mrpc --data-dir glue",
)

Adapters = Annotated[
    list[Path],
    typer.Argument(metavar="ADAPTER...", help="Checkpoints, run folders (the last of each), or any PEFT adapters."),
]


def moments(
    adapters: Adapters,
    data_dir: DataDir = None,
    model: Model = None,
    task: Task = None,
    examples: Annotated[int, typer.Option(min=1, help="The first N training examples, in file order.")] = 512,
    labels: Annotated[
        str, typer.Option(help="sampled: drawn from the model, for the true Fisher information; given: the data's.")
    ] = "sampled",
    out: Annotated[
        Path | None, typer.Option(help="The file to write.  [default: moments.safetensors beside the adapter]")
    ] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, help="Labels sampled for each example.  [default: more where examples are few]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled labels.")] = 0,
    cores: Annotated[
        bool,
        typer.Option("--cores", help="Keep each example's gradient at the updates' cores too (rank 16 at most)."),
    ] = False,
    batch_size: BatchSize = None,
) -> None:
    """Record what the task needs from each update of an adapter, over the first training examples.

    The model runs over the examples, forward and backward, without dropout. It is not changed. The commands of
    msplora-analyze find the file beside the adapter; spectra, compress and advise use it. Several adapters are
    measured one after another.
    """
    from msplora_core.moments import MOMENTS

    with measuring(batch_size):
        from msplora_core.measure.loading import find_adapter, load_subject
        from msplora_core.measure.recording import check_labels, record_moments

        check_labels(labels)
        if out is not None and len(adapters) > 1:
            raise TrainingError(f"out={out}: one file, but {len(adapters)} adapters; leave 'out' out, or give one")
        paths = [out or find_adapter(adapter).adapter / MOMENTS for adapter in adapters]
        for path in paths:
            if path.is_dir():
                raise TrainingError(f"out={path}: is a folder; expected a file, such as {path / MOMENTS}")
        for adapter, path in zip(adapters, paths, strict=True):
            subject = load_subject(adapter, data_dir=data_dir, model=model, task=task)
            batches = subject.batches("train", examples, batch_size)
            with subject.autocast():
                found = record_moments(
                    subject.model,
                    batches,
                    labels=labels,
                    draws=draws,
                    seed=seed,
                    keep_cores=cores,
                    progress=sys.stderr.isatty() and is_writer(),
                    about=subject.about("train"),
                )
            by_writer(partial(found.save, path))
            if is_writer():
                _tell(path, found.about, len(found.modules))
    leave()


def _tell(path: Path, about: Mapping[str, Any], modules: int) -> None:
    print(
        f"{path}: {modules} modules, {about['examples']} examples ({about['tokens']:,} tokens), labels "
        f"{about['labels']}, {about['draws']} an example",
        flush=True,
    )
    for note in about["notes"]:
        print(f"note: {note}", flush=True)
