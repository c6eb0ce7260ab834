"""The learning rate that each method needs on each task, on all-MiniLM-L6-v2.

    python study/learning_rates.py --data-dir glue --jobs 15 --seeds 1 2

Every method is trained at three rates, a factor of about 3 apart, around one that its paper or our earlier runs
suggest. Where the best of them is an edge, the next rate follows, and at most one more after that. With more --seeds,
the two best rates are trained with the others too. All methods have the same rules.

The validation split is never read: it is the test set of the study. A seed shuffles *train*, takes 5,000 rows of it
(all, if there are fewer), and holds out the last tenth. A run learns from the other nine tenths for 10 epochs, by the
task's recipe, and is scored on the tenth. The head's rate is the recipe's: half the rate, for fft all of it.

The script may be stopped and called again: it goes on. What failures.csv has is not tried again. Files in --folder:

    learning_rates.csv    one row a run, appended as it ends; its seconds are those of a run beside others
    chosen.csv            the best rate of every method and task by the metric of the last epoch. Rates that all seeds
                          have are compared, by their means; of equal ones the lower loss decides. Task "all": the best
                          mean over the tasks, of the first seed. edge: no rate beyond the best was tried.
                          last_of_rates: means over the seeds that have the rate
    failures.csv          runs that failed, and why; no file, if none did
    data/                 the rows of every seed and task

The published tables (study/learning_rates/): the command above with --model minilm-float16, a folder with the weights
of all-MiniLM-L6-v2 rounded to float16, trained in float32. One H100, torch 2.11.0, transformers 5.17.0, PEFT 0.21.0.
The train file of QNLI was a tenth of the official one (10,475 rows), the others were whole. A run saw 4,500 rows and
was scored on 500 (RTE 2,241 and 249, MRPC 3,302 and 366).

On a GPU, matrix products are in TF32. Many small runs share one well under NVIDIA MPS (nvidia-cuda-mps-control -d).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import multiprocessing
import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

TASKS = ("qnli", "rte", "mrpc", "stsb", "sst2", "cola")  # the slowest first
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
METHODS: dict[str, tuple[float, dict[str, Any]]] = {  # the rate in the middle, and the options of make_settings
    "msplora-8-4-2": (1e-3, {"method": "msplora", "ranks": {"global": 8, "mid": 4, "layer": 2}}),
    "lora-8": (1e-3, {"method": "lora", "rank": 8}),
    "lora-5": (1e-3, {"method": "lora", "rank": 5}),  # 46,080 parameters; msplora-8-4-2 has 49,152
    "lora-2": (1e-3, {"method": "lora", "rank": 2}),  # the rank of msplora-8-4-2's layer parts
    "adalora": (3e-3, {"method": "adalora"}),
    "dylora": (1e-3, {"method": "dylora"}),
    "pissa": (1e-3, {"method": "pissa"}),
    "lily": (1e-3, {"method": "lily"}),
    "bitfit": (3e-3, {"method": "bitfit"}),
    "adapterdrop": (3e-3, {"method": "adapterdrop"}),
    "fft": (1e-4, {"method": "fft"}),
}
MOST_ROWS = 5000
MOST_RATES = 5
Row = dict[str, Any]


class Run(NamedTuple):
    method: str
    task: str
    learning_rate: float
    seed: int


def main() -> None:
    options = _options()
    for seed in options.seeds:
        for task in options.tasks:
            hold_out(task, seed, options)
    done, failures = options.folder / "learning_rates.csv", options.folder / "failures.csv"
    rows = {_run(row): row for row in read_rows(done)}
    failed = {_run(row) for row in read_rows(failures)}
    running: dict[Future[Row], Run] = {}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["msplora_core.train.training"])  # imported once, for all of them
    with ProcessPoolExecutor(options.jobs, processes) as pool:
        while True:
            for run in wanted(rows, options):
                if len(running) < options.jobs and run not in rows.keys() | failed | set(running.values()):
                    running[pool.submit(train, run, options)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                if error := future.exception():
                    failed.add(run)
                    append_row(run._asdict() | {"reason": " ".join(repr(error).split())[:500]}, failures)
                else:
                    rows[run] = future.result()
                    append_row(rows[run], done)
                print(f"{len(rows)} done, {len(failed)} failed: {' '.join(map(str, run))}", flush=True)
            choose(rows, options.folder / "chosen.csv")


def hold_out(task: str, seed: int, options: argparse.Namespace, most: int | None = MOST_ROWS) -> None:
    """Write nine tenths of a task's train rows as its train split, and one tenth as its validation split."""
    folder = options.folder / "data" / f"seed-{seed}"
    lines = shuffled(options.data_dir / f"{task}_train.jsonl", seed)[:most]
    held_out = len(lines) // 10
    write_rows(lines[:-held_out], folder / f"{task}_train.jsonl")
    write_rows(lines[-held_out:], folder / f"{task}_validation.jsonl")


def shuffled(path: Path, seed: int) -> list[bytes]:
    """The rows of a file, which may be compressed, in the order of a seed."""
    content = path.read_bytes() if path.is_file() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    lines = content.strip().split(b"\n")
    random.Random(seed).shuffle(lines)
    return lines


def write_rows(lines: list[bytes], path: Path) -> None:
    """Write rows of a task."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines))


def wanted(rows: dict[Run, Row], options: argparse.Namespace) -> Iterator[Run]:
    """All runs, in an order that makes a study cut short even: the first seed with the middle rates first."""
    first, *others = options.seeds
    for place, task, method in product(range(MOST_RATES), options.tasks, options.methods):
        rates, _ = _rates(method, task, rows, first)
        if place < len(rates):
            yield Run(method, task, rates[place], first)
    for seed, task, method in product(others, options.tasks, options.methods):
        _, best_two = _rates(method, task, rows, first)
        for rate in best_two:
            yield Run(method, task, rate, seed)


def _rates(method: str, task: str, rows: dict[Run, Row], seed: int) -> tuple[list[float], list[float]]:
    """The middle rate, its neighbours, and the next ones as long as the best is an edge; when all ran, the best two."""
    middle = RATES.index(METHODS[method][0])
    rates = [RATES[middle], RATES[middle - 1], RATES[middle + 1]]
    while all(Run(method, task, rate, seed) in rows for rate in rates):
        best_two = sorted(rates, key=lambda rate: -_score(rows[Run(method, task, rate, seed)]))[:2]
        best = RATES.index(best_two[0])
        if len(rates) == MOST_RATES or min(rates) < RATES[best] < max(rates):
            return rates, best_two
        rates.append(RATES[best - 1 if RATES[best] == min(rates) else best + 1])
    return rates, []


def _score(row: Row) -> float:
    """The metric of the last epoch; the loss decides between equals, and training that diverged is the worst."""
    score = float(row["last"]) - 1e-6 * float(row["held_out_loss"])
    return score if math.isfinite(score) else -1.0


def train(run: Run, options: argparse.Namespace) -> Row:
    """Train one run in a folder that is removed; returns its row."""
    import torch

    from msplora_core.run.settings import make_settings
    from msplora_core.train.training import train

    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32, on a GPU
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(
            model=options.model,
            task=run.task,
            output_dir=Path(folder) / "run",
            data_dir=options.folder / "data" / f"seed-{run.seed}",
            seed=run.seed,
            epochs=options.epochs,
            learning_rate=run.learning_rate,
            **METHODS[run.method][1],
        )
        results = train(settings, report=lambda line: None)
        record = json.loads((settings.output_dir / "run.json").read_text())
    best = max(results, key=lambda result: (math.isfinite(result.metric), result.metric))
    return (
        {"model": Path(options.model).name, "task": run.task, "method": run.method}
        | {name: record["settings"][name] for name in ("learning_rate", "head_learning_rate", "seed", "epochs")}
        | {
            f"{name}_rows": data["rows"]
            for name, data in zip(("train", "held_out"), record["data"].values(), strict=True)
        }
        | {"adapter_parameters": record["parameters"]["adapter"], "metric": record["metric"]["name"]}
        | {"last": results[-1].metric, "best": best.metric, "best_epoch": best.epoch}
        | {"held_out_loss": results[-1].validation_loss, "train_loss": results[-1].train_loss}
        | {"seconds": record["seconds"], "device": record["device"]}
        | {library: record["versions"][library] for library in ("torch", "transformers", "peft")}
        | {"precision": "fp32, products in tf32" if torch.cuda.is_available() else "fp32"}
    )


def choose(rows: dict[Run, Row], path: Path) -> None:
    """Write the best rate of every method and task, and of every method over the tasks together."""
    import pandas as pd

    runs = pd.DataFrame([run._asdict() | {"score": _score(row)} for run, row in rows.items()])
    first = runs["seed"].iloc[0]
    path.unlink(missing_ok=True)
    for method, of_method in runs.groupby("method"):
        of_first = of_method[of_method["seed"] == first].pivot(index="task", columns="learning_rate", values="score")
        tables = {
            task: of_task.pivot(index="seed", columns="learning_rate", values="score")
            for task, of_task in of_method.groupby("task")
        }
        tables["all"] = of_first.dropna(axis="columns").mean().to_frame(first).T
        for task, table in tables.items():
            compared = table.dropna(thresh=min(2, table.shape[1])).dropna(axis="columns")
            if not compared.empty:
                means, tried = compared.mean(), table.mean().round(4) + 0.0
                best = means.idxmax()
                row = {
                    "method": method,
                    "task": task,
                    "learning_rate": best,
                    "last": f"{round(means[best], 4) + 0.0:.4f}",
                }
                row |= {"edge": best in (tried.index.min(), tried.index.max()), "seeds": len(compared)}
                row |= {"rates": " ".join(map(str, tried.index)), "last_of_rates": " ".join(f"{x:.4f}" for x in tried)}
                append_row(row, path)


def _run(row: Row) -> Run:
    return Run(row["method"], row["task"], float(row["learning_rate"]), int(row["seed"]))


def read_rows(path: Path) -> list[Row]:
    return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []


def append_row(row: Row, path: Path) -> None:
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with {task}_train.jsonl[.gz]")
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_suffix(""), help="where the tables go")
    parser.add_argument("--model", default="minilm", help="as msplora-train takes it (default: minilm)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="default: 1")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parser.parse_args()


if __name__ == "__main__":
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    main()
