"""The runs of docs/calibration.md: adapters on which it is measured what an update is worth to its task.

    python study/calibration.py train --data-dir glue --jobs 12
    python study/calibration.py measure --data-dir glue --jobs 8
    python study/calibration.py examples --data-dir glue --jobs 8 --seeds 0
    python study/calibration.py cores --data-dir glue --jobs 8 --models minilm --methods lora-8 --seeds 0
    python study/calibration.py steps --data-dir glue --jobs 8 --models minilm --methods lora-8 --seeds 0
    python study/calibration_tables.py                  # tables and figures of what was measured

`train` makes the runs, `measure` cuts their adapters and measures what each cut costs, `examples` and `steps` ask how
many examples the predictions need, `cores` whether exact Fisher information chooses better directions. Call any of them
again to go on: complete runs are skipped, runs that were cut off continue from their newest epoch. One seed of all
comes after the other, the longest runs of a seed first. A run that fails is told, with its reason, and the next call
tries it again.

    FOLDER/models/<model>                                   a base model as a folder, read in place of a GGUF file
    FOLDER/runs/<model>/<task>/<method>/seed-<n>/           run folders of msplora-train
    FOLDER/measured/<model>/<task>/<method>/seed-<n>.csv    a row a cut: its cost, and what each measure says of it
    FOLDER/examples/<model>/<task>/<method>/seed-<n>.csv    the same cuts, predicted from fewer or more examples
    FOLDER/cores/<model>/<task>/<method>/seed-<n>.csv       cuts to few directions, chosen in several ways
    FOLDER/steps/<model>/<task>/<method>/seed-<n>.csv       predictions from 32 to 4,096 examples, of one recording

Kept of a run are its record, the checkpoint before training and the last one, each with the adapter and its head.

Learning rates. MiniLM: those of study/learning_rates/chosen.csv, which never read the validation split. LoRA has on
CoLA that of its row "all", as no rate was better than another there; MSPLoRA 8/8/8 has the rates of 8/4/2. SmolLM2: the
rate of the study (docs/study.md), whose search did read validation scores, of three tasks, two methods and seed 0.

On a GPU, matrix products are in TF32. Many small runs share one well under NVIDIA MPS (nvidia-cuda-mps-control -d). The
published runs: one H100, torch 2.11.0, transformers 5.17.0, PEFT 0.21.0; MiniLM's weights were rounded to float16.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

TASKS = ("cola", "stsb", "mrpc", "rte")  # the longest first
METHODS: dict[str, dict[str, Any]] = {  # options of make_settings
    "msplora-8-8-8": {"method": "msplora", "ranks": {"global": 8, "mid": 8, "layer": 8}},
    "msplora-8-4-2": {"method": "msplora", "ranks": {"global": 8, "mid": 4, "layer": 2}},
    "lora-8": {"method": "lora", "rank": 8},
}


CHOSEN = Path(__file__).parent / "learning_rates" / "chosen.csv"


@dataclass(frozen=True)
class Plan:
    """How a model is trained; all else is the recipe of msplora-train."""

    epochs: int
    learning_rate: float | None
    """None: that of chosen.csv."""

    def rate(self, task: str, method: str) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return chosen_rate(task, "msplora-8-4-2" if method == "msplora-8-8-8" else method)


def chosen_rate(task: str, method: str) -> float:
    """The searched rate of MiniLM; where the search saw only the majority class, that of all tasks together."""
    row = "all" if task == "cola" and method in ("lora-8", "lora-5", "dylora") else task
    chosen = {(of["method"], of["task"]): of["learning_rate"] for of in csv.DictReader(CHOSEN.open())}
    return float(chosen[method, row])


MODELS = {"minilm": Plan(10, None), "smollm2": Plan(3, 1e-3)}
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "method_state.pt", "training_args.bin", "README.md")


class Run(NamedTuple):
    model: str
    task: str
    method: str
    seed: int

    def folder(self, options: argparse.Namespace) -> Path:
        return options.folder / "runs" / self.model / self.task / self.method / f"seed-{self.seed}"

    def table(self, name: str, options: argparse.Namespace) -> Path:
        return options.folder / name / self.model / self.task / self.method / f"seed-{self.seed}.csv"


def main() -> None:
    options = _options()
    failed = in_processes(PARTS[options.part], options)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; call again to try them once more")


def freeing(do: Callable[[Run, argparse.Namespace], str], run: Run, options: argparse.Namespace) -> str:
    """Do it; then give memory back: the next run of this process, and those beside it, need other sizes."""
    import torch

    try:
        return do(run, options)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def in_processes(part: Part, options: argparse.Namespace) -> list[str]:
    """Do what is not done, `--jobs` runs at a time; after `--minutes` start none. Returns what failed."""
    for model in options.models:
        base_model(model, options)
    runs = part.runs(options)
    waiting = [run for run in runs if not part.is_done(run, options)]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are complete", flush=True)
    end = time.monotonic() + 60 * options.minutes
    running: dict[Future[str], Run] = {}
    failed: list[str] = []
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["msplora_core.train.training"])  # imported once, for all of them
    with ProcessPoolExecutor(options.jobs, processes) as pool:
        while (waiting and time.monotonic() < end) or running:
            while waiting and len(running) < options.jobs and time.monotonic() < end:
                run = waiting.pop(0)
                if not part.is_done(run, options):  # by another call of this script beside it
                    running[pool.submit(freeing, part.do, run, options)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = "/".join(map(str, running.pop(future)))
                error = future.exception()
                failed += [name] * (error is not None)
                said = f"failed: {' '.join(repr(error).split())[:500]}" if error else future.result()
                print(f"{name}: {said}", flush=True)
    if waiting:
        sys.exit(f"{len(waiting) + len(failed)} runs are left: call again to go on")
    return failed


def wanted(options: argparse.Namespace) -> list[Run]:
    runs = product(options.seeds, options.models, options.tasks, options.methods)
    return [Run(model, task, method, seed) for seed, model, task, method in runs]


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
    plan = MODELS[run.model]
    said = train_with(
        run,
        options,
        data_dir=options.data_dir,
        epochs=options.epochs or plan.epochs,
        learning_rate=plan.rate(run.task, run.method),
        **METHODS[run.method],
    )
    thin(run.folder(options))
    return said


def train_with(run: Run, options: argparse.Namespace, **given: Any) -> str:
    """Train one run with these settings; returns its outcome in words."""
    import torch

    from msplora_core.run.settings import make_settings
    from msplora_core.train.training import train

    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32, on a GPU
    started = time.perf_counter()
    settings = make_settings(
        model=str(base_model(run.model, options)),
        task=run.task,
        output_dir=run.folder(options),
        seed=run.seed,
        resume=True,
        **given,
    )
    results = train(settings, report=lambda line: None)
    return f"{results[0].metric:.3f} -> {results[-1].metric:.3f} in {time.perf_counter() - started:.0f} s"


def thin(folder: Path, *, every_epoch: bool = False) -> None:
    """Leave of a run's checkpoints the one before training and the last, without what training goes on from."""
    _, *between, _ = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for checkpoint in between if not every_epoch else ():
        shutil.rmtree(checkpoint)
    for path in (path for name in RESUME_FILES for path in folder.glob(f"checkpoint-*/{name}")):
        path.unlink()


def is_trained(run: Run, options: argparse.Namespace) -> bool:
    record = run.folder(options) / "run.json"
    if not record.is_file():
        return False
    epochs = options.epochs or MODELS[run.model].epochs
    return [result["epoch"] for result in json.loads(record.read_text()).get("results", [])] == list(range(epochs + 1))


def trained(options: argparse.Namespace) -> list[Run]:
    return [run for run in wanted(options) if is_trained(run, options)]


def measure_one(run: Run, options: argparse.Namespace) -> str:
    """What each cut of a run costs, and each measure says of it."""
    import calibration_measure as measuring

    return _measured(run, "measured", measuring.measured, options)


def compare_examples(run: Run, options: argparse.Namespace) -> str:
    """What other numbers of examples say of the same cuts."""
    import calibration_measure as measuring

    return _measured(run, "examples", measuring.by_examples, options)


def compare_cores(run: Run, options: argparse.Namespace) -> str:
    """What cuts cost whose directions are chosen by exact Fisher information."""
    import calibration_cores as measuring

    return _measured(run, "cores", measuring.by_cores, options)


def step_examples(run: Run, options: argparse.Namespace) -> str:
    """What 32 to 4,096 examples predict, sampled and given labels."""
    import calibration_cores as measuring

    return _measured(run, "steps", measuring.by_steps, options)


def _measured(run: Run, table: str, measure: Callable[[Any, int], Any], options: argparse.Namespace) -> str:
    from calibration_measure import load, write

    started = time.perf_counter()
    subject = load(run.folder(options), base_model(run.model, options), options.data_dir)
    write(measure(subject, run.seed), run._asdict(), run.table(table, options))
    return f"{table} in {time.perf_counter() - started:.0f} s"


class Part(NamedTuple):
    """What is done with runs: of which, how, and whether it is done already."""

    runs: Callable[[argparse.Namespace], list[Run]]
    do: Callable[[Run, argparse.Namespace], str]
    is_done: Callable[[Run, argparse.Namespace], bool]


PARTS = {
    "train": Part(wanted, train_one, is_trained),
    "measure": Part(trained, measure_one, lambda run, options: run.table("measured", options).is_file()),
    "examples": Part(trained, compare_examples, lambda run, options: run.table("examples", options).is_file()),
    "cores": Part(trained, compare_cores, lambda run, options: run.table("cores", options).is_file()),
    "steps": Part(trained, step_examples, lambda run, options: run.table("steps", options).is_file()),
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/calibration"), help="default: runs/calibration")
    parser.add_argument("--data-dir", type=Path, help="folder with {task}_train.jsonl[.gz] and so on; else the Hub")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--epochs", type=int, help="default: 10 for minilm, 3 for smollm2")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    main()
