"""``msplora-measure added``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from msplora_core.errors import TrainingError
from msplora_core.measure.commands.shared import Adapter, BatchSize, DataDir, Model, Task, measuring

EXAMPLES = (
    "msplora-measure added runs/cola runs/mrpc runs/rte        # then: msplora-analyze relate runs/cola runs/mrpc",
    "msplora-measure added adapter style --model meta-llama/Llama-2-7b-hf --task alpaca --data-dir data",
)


def added(
    adapter: Adapter,
    others: Annotated[
        list[Path],
        typer.Argument(metavar="OTHER...", help="Adapters to add, of the same base model: runs, or any PEFT adapters."),
    ],
    data_dir: DataDir = None,
    model: Model = None,
    task: Task = None,
    examples: Annotated[int, typer.Option(min=1, help="The first N training examples, in file order.")] = 512,
    out: Annotated[
        Path | None, typer.Option(help="The file to write.  [default: added.json beside the adapter]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled labels.")] = 0,
    batch_size: BatchSize = None,
) -> None:
    """Predict what adding other adapters at full weight costs the task of this one, in nats an example.

    The model runs with this adapter alone, forward and backward. The others are not applied. msplora-analyze relate
    finds the file beside the adapter.
    """
    from msplora_core.added import ADDED

    with measuring(batch_size):
        from msplora_core.measure.adding import factors_of, record_added
        from msplora_core.measure.loading import find_adapter, load_subject

        path = out or find_adapter(adapter).adapter / ADDED
        if path.is_dir():
            raise TrainingError(f"out={path}: is a folder; expected a file, such as {path / ADDED}")
        folders = [find_adapter(other).adapter for other in others]
        subject = load_subject(adapter, data_dir=data_dir, model=model, task=task)
        updates = factors_of(subject.without_adapter(), folders)
        subject = subject.with_adapter()
        with subject.autocast():
            found = record_added(
                subject.model,
                subject.batches("train", examples, batch_size),
                dict(zip(map(str, others), updates, strict=True)),
                seed=seed,
                progress=sys.stderr.isatty(),
                about=subject.about("train"),
            )
        found.save(path)
    unit = "mean squared difference" if found.about["loss"] == "regression" else "nats an example"
    for other in found.others:
        most = max(other.modules, key=lambda name: other.modules[name])
        print(f"{other.adapter}: {other.predicted_kl:.3g} {unit}; of one module most by {most}")
    print(f"{path}: {found.about['examples']} examples, draws {found.about['draws']} an example")
