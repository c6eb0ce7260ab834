"""What batching and recording cost in a real CoLA run, on this machine's CPU.

    python benchmarks/training.py batching --data-dir DIR [--batches 134] [--model minilm]
    python benchmarks/training.py recording --data-dir DIR [--epochs 2] [--model minilm]

``batching``: an epoch's optimisation steps with batches padded to their own longest sentence, as msplora-train makes
them, and to 256 tokens, as the script released with the MSPLoRA paper does; the same model, sentences and batch size.
The two take turns on every batch, and their losses are compared (dropout off, learning rate 0: so that both see one
model). ``recording``: the part of a run that writing checkpoint-0 and every epoch's checkpoint takes; evaluation is
counted as training. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DataCollatorWithPadding, set_seed

from msplora_core.data.encoding import tokenize
from msplora_core.data.loading import load_splits
from msplora_core.data.tasks import get_task
from msplora_core.models import find_model, load_model
from msplora_core.run.settings import make_settings
from msplora_core.train.trainer import AdapterTrainer
from msplora_core.train.training import train


def batching(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an epoch of each way of padding, and the largest difference of a batch's loss."""
    task = get_task("cola")
    settings = make_settings(
        model=options.model, task="cola", method="msplora", output_dir=Path("unused"), data_dir=options.data_dir
    )
    set_seed(0)
    base, tokenizer = load_model(find_model(options.model), task)
    model = settings.method.adapt(base, task.peft_task_type).eval()  # no dropout, so that losses can be compared
    examples = tokenize(load_splits(task, options.data_dir)["train"], task, tokenizer, settings.max_length)
    order = torch.randperm(len(examples))
    size = settings.batch_size
    batches = [[examples[i] for i in order[at : at + size]] for at in range(0, len(order), size)][: options.batches]
    collators = {
        "own length": DataCollatorWithPadding(tokenizer),
        "256 tokens": DataCollatorWithPadding(tokenizer, padding="max_length", max_length=256),
    }
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    seconds: dict[str, list[float]] = {name: [] for name in collators}
    lengths: dict[str, list[int]] = {name: [] for name in collators}
    worst = 0.0
    for batch in batches:
        losses = []
        for name, collator in collators.items():
            started = time.perf_counter()
            padded = collator(batch)
            loss = model(**padded).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            seconds[name].append(time.perf_counter() - started)
            lengths[name].append(padded["input_ids"].shape[1])
            losses.append(loss.item())
        worst = max(worst, abs(losses[0] - losses[1]))
    totals = {name: sum(of) for name, of in seconds.items()}
    return {
        "batches": len(batches),
        "batch_size": size,
        "median_length": {name: statistics.median(of) for name, of in lengths.items()},
        "seconds": totals,
        "ratio": totals["own length"] / totals["256 tokens"],
        "largest_difference_of_loss": worst,
    }


def recording(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds that saving takes in a run, beside the run's."""
    spent: list[float] = []

    def timed(method: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - started)

        return wrapper

    for name in ("_save_checkpoint", "save_first"):
        setattr(AdapterTrainer, name, timed(getattr(AdapterTrainer, name)))
    folder = Path(tempfile.mkdtemp())
    settings = make_settings(
        model=options.model,
        task="cola",
        method="msplora",
        output_dir=folder / "run",
        data_dir=options.data_dir,
        epochs=options.epochs,
    )
    started = time.perf_counter()
    train(settings, report=lambda line: None)
    total = time.perf_counter() - started
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    return {
        "epochs": options.epochs,
        "checkpoints": len(spent),
        "seconds": total,
        "seconds_recording": sum(spent),
        "part": sum(spent) / total,
        "megabytes": size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("batching", "recording"))
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with cola_train.jsonl")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--batches", type=int, default=None, help="only the first ones of the epoch")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    result = {"batching": batching, "recording": recording}[options.what](options)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"model": options.model, "device": device, "versions": versions} | result, indent=1))


if __name__ == "__main__":
    main()
