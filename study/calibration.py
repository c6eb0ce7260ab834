"""The runs of docs/calibration.md: adapters on which it is measured what an update is worth to its task.

    python study/calibration.py train --data-dir glue --jobs 12
    python study/calibration.py train --data-dir glue --models smollm2 --jobs 6 --minutes 10

Call it again to go on: complete runs are skipped, runs that were cut off continue from their newest epoch. One seed of all
comes after the other, the longest runs of a seed first, so that a calibration cut short is even. A run that fails is told,
with its reason, and the next call tries it again.

    FOLDER/models/<model>                             a base model as a folder of safetensors, read in place of a GGUF file
    FOLDER/runs/<model>/<task>/<method>/seed-<n>/     run folders of msplora-train, without what only resuming needs

Kept of a run are its record, the checkpoint before training and the last one, each with the adapter and its head. Of MiniLM's
first seed every epoch's checkpoint is kept.

Learning rates. MiniLM: the row "all" of study/learning_rates/chosen.csv, which never read the validation split; MSPLoRA 8/8/8
has the rate of 8/4/2. SmolLM2: the rate of the study (docs/study.md), whose search did read validation scores, of another
seed and fewer epochs. No rate was searched for these runs.

On a GPU, matrix products are in TF32; SmolLM2 trains in bfloat16 (autocast), its weights and adapters in float32. Many
small runs share one GPU well under NVIDIA MPS (nvidia-cuda-mps-control -d).
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

TASKS = ("cola", "stsb", "mrpc", "rte")  # the longest first
METHODS: dict[str, dict[str, Any]] = {  # options of make_settings
    "msplora-8-8-8": {"method": "msplora", "ranks": {"global": 8, "mid": 8, "layer": 8}},
    "msplora-8-4-2": {"method": "msplora", "ranks": {"global": 8, "mid": 4, "layer": 2}},
    "lora-8": {"method": "lora", "rank": 8},
}


@dataclass(frozen=True)
class Plan:
    """How a model is trained; all else is the recipe of msplora-train."""

    epochs: dict[str, int]
    learning_rates: dict[str, float]
    every_epoch: tuple[int, ...] = ()
    """Seeds of which every epoch's checkpoint is kept."""
    options: dict[str, Any] = field(default_factory=dict)
    at_once: dict[str, int] = field(default_factory=dict)
    """Examples computed at once, where a batch of long ones would need too much memory."""


MODELS = {
    "minilm": Plan(
        epochs=dict.fromkeys(TASKS, 20),
        learning_rates={"lora-8": 1e-3, "msplora-8-4-2": 3e-4, "msplora-8-8-8": 3e-4},
        every_epoch=(0,),
    ),
    "smollm2": Plan(
        epochs={"cola": 3, "stsb": 3, "mrpc": 4, "rte": 4},
        learning_rates=dict.fromkeys(METHODS, 1e-3),
        options={"precision": "bf16"},
        at_once={"rte": 32},
    ),
}
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "README.md")


class Run(NamedTuple):
    model: str
    task: str
    method: str
    seed: int

    def folder(self, options: argparse.Namespace) -> Path:
        return options.folder / "runs" / self.model / self.task / self.method / f"seed-{self.seed}"


def main() -> None:
    options = _options()
    failed = train(options)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; call again to try them once more")


def train(options: argparse.Namespace) -> list[str]:
    """Train what is not complete, `--jobs` at a time; after `--minutes` start none. Returns what failed."""
    for model in options.models:
        base_model(model, options)
    waiting = [run for run in wanted(options) if not _is_complete(run, options)]
    total = sum(1 for _ in wanted(options))
    print(f"{total - len(waiting)} of {total} runs are complete", flush=True)
    end = time.monotonic() + 60 * options.minutes
    running: dict[Future[str], Run] = {}
    failed: list[str] = []
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["msplora_core.train.training"])  # imported once, for all of them
    with ProcessPoolExecutor(options.jobs, processes) as pool:
        while (waiting and time.monotonic() < end) or running:
            while waiting and len(running) < options.jobs and time.monotonic() < end:
                running[pool.submit(train_one, waiting[0], options)] = waiting[0]
                waiting.pop(0)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = "/".join(map(str, running.pop(future)))
                if error := future.exception():
                    failed.append(name)
                    print(f"{name}: failed: {' '.join(repr(error).split())[:500]}", flush=True)
                else:
                    print(f"{name}: {future.result()}", flush=True)
    if waiting:
        sys.exit(f"{len(waiting) + len(failed)} runs are left: call again to go on")
    return failed


def wanted(options: argparse.Namespace) -> Iterator[Run]:
    for seed in options.seeds:
        for model in options.models:
            for task in options.tasks:
                for method in options.methods:
                    yield Run(model, task, method, seed)


def base_model(model: str, options: argparse.Namespace) -> Path:
    """The folder of a base model; made once, as reading a GGUF file takes longer than some of the runs."""
    folder = options.folder / "models" / model
    if not folder.is_dir():
        from msplora_core.data.tasks import get_task
        from msplora_core.models import find_model, load_model

        # As a causal model: every run's head is made by its own seed.
        task = "alpaca" if model == "smollm2" else options.tasks[0]
        loaded, tokenizer = load_model(find_model(model), get_task(task))
        getattr(loaded, loaded.base_model_prefix).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def train_one(run: Run, options: argparse.Namespace) -> str:
    """Train one run and drop what is not kept; returns its outcome in words."""
    import torch

    from msplora_core.run.settings import make_settings
    from msplora_core.train.training import train

    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32, on a GPU
    plan, started = MODELS[run.model], time.perf_counter()
    settings = make_settings(
        model=str(base_model(run.model, options)),
        task=run.task,
        output_dir=run.folder(options),
        data_dir=options.data_dir,
        seed=run.seed,
        epochs=options.epochs or plan.epochs[run.task],
        learning_rate=plan.learning_rates[run.method],
        micro_batch_size=plan.at_once.get(run.task),
        resume=True,
        **plan.options,
        **METHODS[run.method],
    )
    try:
        results = train(settings, report=lambda line: None)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next run of this process, and those beside it, need other sizes
    _thin(settings.output_dir, keep_all=run.seed in plan.every_epoch)
    return f"{results[0].metric:.3f} -> {results[-1].metric:.3f} in {time.perf_counter() - started:.0f} s"


def _thin(folder: Path, keep_all: bool) -> None:
    *between, _first = checkpoints = sorted(
        folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])
    )
    for checkpoint in checkpoints:
        if checkpoint in between[1:] and not keep_all:
            shutil.rmtree(checkpoint)
        else:
            for name in RESUME_FILES:
                (checkpoint / name).unlink(missing_ok=True)


def _is_complete(run: Run, options: argparse.Namespace) -> bool:
    record = run.folder(options) / "run.json"
    if not record.is_file():
        return False
    epochs = options.epochs or MODELS[run.model].epochs[run.task]
    return [result["epoch"] for result in json.loads(record.read_text()).get("results", [])] == list(range(epochs + 1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("train",))
    parser.add_argument("--folder", type=Path, default=Path("runs/calibration"), help="default: runs/calibration")
    parser.add_argument("--data-dir", type=Path, help="folder with {task}_train.jsonl[.gz] and so on; else the Hub")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--epochs", type=int, help="default: 20 for minilm, 3 or 4 for smollm2")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    main()
