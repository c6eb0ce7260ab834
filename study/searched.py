"""What studies of fresh trainings share: a learning rate searched for each configuration, then fresh seeds at it.

A training has a part, ``search`` or ``test``, and its row is appended to <folder>/<task>.csv as it ends.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from learning_rates import append_row, hold_out, read_rows, shuffled, write_rows

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
TASKS = ("qnli", "stsb", "mrpc", "sst2")
"""Those that all-MiniLM-L6-v2 learns; on CoLA and RTE it stays near chance. The longest come first."""
TEST_ROWS = {"train": 4000, "validation": 2000}


class Run(NamedTuple):
    part: str
    """``search`` or ``test``."""
    configuration: str
    learning_rate: float
    seed: int


class Search(NamedTuple):
    """The rates to try: ``first`` of them, then the next of ``rates`` while the best is an edge, ``most`` in all."""

    rates: tuple[float, ...]
    first: tuple[float, ...]
    most: int
    seeds: tuple[int, ...]

    def of(self, configuration: str, rows: dict[Run, Row], column: str = "last") -> tuple[list[float], float | None]:
        """The rates to try, and when all are tried the best of them, by the column of the rows."""
        tried = list(self.first)
        while all(run in rows for rate in tried for run in self.runs(configuration, rate)):
            scores = {rate: self._score(configuration, rate, rows, column) for rate in tried}
            best = max(tried, key=lambda rate: scores[rate])
            if len(tried) == self.most or min(tried) < best < max(tried):
                return tried, best
            tried.append(self.rates[self.rates.index(best) + (1 if best == max(tried) else -1)])
        return tried, None

    def runs(self, configuration: str, rate: float) -> list[Run]:
        """The searches at one rate."""
        return [Run("search", configuration, rate, seed) for seed in self.seeds]

    def _score(self, configuration: str, rate: float, rows: dict[Run, Row], column: str) -> float:
        """The mean metric; the loss decides between equals, and training that diverged is the worst."""
        found = [rows[run] for run in self.runs(configuration, rate)]
        score = sum(float(row[column]) - 1e-6 * float(row["loss"]) for row in found) / len(found)
        return score if math.isfinite(score) else -1.0


def training_options(
    parser: argparse.ArgumentParser, *, seeds: Sequence[int], tasks: Sequence[str] = (), batch_size: int | None = None
) -> None:
    """What every study of fresh trainings is told; without ``tasks`` there is no choice of them.

    Args:
        parser: Is given the options.
        seeds: The default.
        tasks: The choice, and the default.
        batch_size: The default. A few thousand rows are too few steps at the recipes' 64: training ends before it
            learns. None: there is no such option.
    """
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with {task}_train.jsonl[.gz]")
    if tasks:
        parser.add_argument("--tasks", nargs="+", choices=tasks, default=list(tasks))
    told = " ".join(map(str, seeds))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds), help=f"default: {told}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    if batch_size:
        parser.add_argument("--batch-size", type=int, default=batch_size, help=f"default: {batch_size}")


def call(parts: Mapping[str, Callable[[argparse.Namespace], None]], options: argparse.Namespace) -> None:
    """Do the part of a study that is asked for; its processes are quiet and take one thread each."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    parts[options.part](options)


def write_test_rows(options: argparse.Namespace) -> Path:
    """Write the rows of each task that a test trains on and is scored on; returns their folder."""
    folder: Path = options.folder / "data" / "test"
    for task in options.tasks:
        for split, most in TEST_ROWS.items():
            write_rows(shuffled(options.data_dir / f"{task}_{split}.jsonl", 0)[:most], folder / f"{task}_{split}.jsonl")
    return folder


def data_of(run: Run, options: argparse.Namespace) -> Path:
    """The rows of one training."""
    folder: Path = options.folder / "data"
    return folder / (f"seed-{run.seed}" if run.part == "search" else "test")


def read_runs(options: argparse.Namespace, task: str) -> dict[Run, Row]:
    """What is trained already."""
    rows = read_rows(options.folder / f"{task}.csv")
    return {Run(row["part"], row["configuration"], float(row["learning_rate"]), int(row["seed"])): row for row in rows}


def all_runs(options: argparse.Namespace, tasks: Sequence[str]) -> pd.DataFrame:
    """The rows of all tasks, written to runs.csv of --out; where there are none, the published ones that it has."""
    import pandas as pd

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "runs.csv"
    if found := [row for task in tasks for row in read_runs(options, task).values()]:
        pd.DataFrame(found).to_csv(path, index=False, lineterminator="\n")
    return pd.read_csv(path)


def train_wanted(
    options: argparse.Namespace,
    search: Search,
    most_rows: int | None,
    wanted: Callable[[str, dict[Run, Row]], Iterable[Run]],
    train_one: Callable[[str, Run, argparse.Namespace], Row],
) -> None:
    """Train what is not trained yet: :func:`train_all`, with the rows that tests have and searches hold out.

    Args:
        options: As there, and data_dir.
        search: Its seeds hold out a tenth of the training rows each.
        most_rows: Of those that are held out and trained on in a search; None: all.
        wanted: As there.
        train_one: As there.
    """
    write_test_rows(options)
    for task in options.tasks:
        for seed in search.seeds:
            hold_out(task, seed, options, most=most_rows)
    train_all(options, wanted, train_one)


def train_all(
    options: argparse.Namespace,
    wanted: Callable[[str, dict[Run, Row]], Iterable[Run]],
    train_one: Callable[[str, Run, argparse.Namespace], Row],
) -> None:
    """Train what is not trained yet, the tasks in turn, --jobs at once; after --minutes start none.

    Args:
        options: folder, tasks, jobs, minutes.
        wanted: Of a task and its rows, what is to be trained, as far as it can be told by now.
        train_one: Trains one run, in a process of its own; returns its row.
    """
    rows = {task: read_runs(options, task) for task in options.tasks}
    end = time.monotonic() + 60 * options.minutes
    running: dict[Future[Row], tuple[str, Run]] = {}
    failed: set[tuple[str, Run]] = set()
    processes = multiprocessing.get_context("forkserver")
    # What is imported once, for all of them; but bitsandbytes starts CUDA, which works in no fork of that process.
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    processes.set_forkserver_preload(["torch" if has_bitsandbytes else "msplora_core.train.training"])
    with ProcessPoolExecutor(options.jobs, processes) as pool:
        while True:
            for task in options.tasks if time.monotonic() < end else ():
                for run in wanted(task, rows[task]):
                    taken = run in rows[task] or (task, run) in failed | set(running.values())
                    if len(running) < options.jobs and not taken:
                        running[pool.submit(train_one, task, run, options)] = task, run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, run = running.pop(future)
                if error := future.exception():
                    failed.add((task, run))
                    print(f"{task} {run}: failed: {' '.join(repr(error).split())[:500]}", flush=True)
                else:
                    rows[task][run] = future.result()
                    append_row(rows[task][run], options.folder / f"{task}.csv")
                    print(f"{task} {' '.join(map(str, run))}: {rows[task][run]['last']:.3f}", flush=True)


def train_run(
    task: str,
    run: Run,
    options: argparse.Namespace,
    look: Callable[[Path], Row] = lambda folder: {},
    **given: Any,
) -> Row:
    """Train one run in a folder that is removed; returns its row.

    Args:
        task: Of msplora-train.
        run: What is trained; its rate and seed are the training's.
        options: model (name or folder) and epochs.
        look: Called with the run folder when training has ended: what the row has besides.
        given: More of ``Settings``, such as method and data_dir.
    """
    from msplora_core.run.settings import Settings
    from msplora_core.train.training import train

    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        about = {"model": options.model, "seed": run.seed, "epochs": options.epochs, "learning_rate": run.learning_rate}
        settings = Settings(task=task, output_dir=Path(folder) / "run", **about | given)
        results = train(settings, report=lambda line: None)
        record = json.loads((settings.output_dir / "run.json").read_text())
        seen = look(settings.output_dir)
    return (
        {"task": task}
        | run._asdict()
        | {"parameters": record["parameters"]["adapter"], "metric": record["metric"]["name"]}
        | {"first": results[0].metric, "last": results[-1].metric}
        | {"loss": results[-1].validation_loss, "train_loss": results[-1].train_loss}
        | {f"{name}_rows": data["rows"] for name, data in record["data"].items()}
        | {"epochs": results[-1].epoch, "seconds": record["seconds"], "device": record["device"]}
        | seen
    )


def prepare_process() -> None:
    """Before each training: one thread, TF32 on a GPU, and its memory given back for those beside it."""
    import torch

    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
