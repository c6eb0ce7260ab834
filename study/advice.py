"""Is training at the advised ranks as good? Adapters of all-MiniLM-L6-v2, trained as `msplora-analyze advise` says.

    python study/advice.py plan runs/calibration/runs/minilm/*/lora-8/seed-0   # originals, with moments beside them
    python study/advice.py train --data-dir glue --jobs 15
    python study/advice.py tables

`plan` asks `advise` of each original, and writes plan.json. A configuration there is a rank for every module; alpha is
twice the rank everywhere, as in the original, so that the scaling is the same for all:

    r8          the original: LoRA, r = 8, on query and value
    r4          half of it
    r1          next to nothing
    advised     the advised rank for all modules (where that is 4, it is r4)
    pattern     the advised rank for each module, where `advise` says that this pays
    even        as many directions as the pattern, spread evenly over the modules
    plain       as many directions as the pattern, chosen by the plain spectrum: the largest singular values, at least 1

`train`. The rates 5e-4, 1e-3 and 2e-3 are searched for each configuration and task, and one more where the best of them
is an edge. Searching, seeds 1 and 2 each hold out a tenth of *train*, train on the rest and are scored there; the best
mean decides. Then fresh seeds train at that rate on all of *train* and are scored on the validation split, at the last
epoch. No rank or rate was chosen on it: moments are of training examples, the original has a seed of its own. May be
stopped and called again: it goes on.

The criterion, stated before the runs. Of each task the advice is the pattern if there is one, else the rank. Its
difference to another configuration is the mean over seeds of paired differences, with a 95 % interval by t. It is

    right   if the interval to the original (r8) lies above -0.01: at worst it loses what `advise` allows a cut to lose
    wrong   if the interval lies below -0.01
    open    else: too few seeds to tell

and the pattern is worth having if it is not worse than `even` and better on one task at least, in this sense:
better or worse if the interval excludes 0. A task on which r1 is as good as r8 tells nothing of ranks.

Files in --folder: plan.json; <task>.csv, a row a run, appended as it ends. `tables` writes advice_tried.csv of them.

The published runs: one process a task on two H100s, torch 2.11.0, transformers 5.17.0, PEFT 0.21.0; 10 epochs, the
recipe of the task, float32 with products in TF32; weights of MiniLM rounded to float16. Runs at rates that the search
did not choose were added afterwards (--rates); the table does not use them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from learning_rates import append_row, hold_out, read_rows

from msplora_core.methods.lora import Lora

TASKS = ("cola", "stsb", "mrpc", "rte")  # the longest first
RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
FIRST, MOST = (1e-3, 5e-4, 2e-3), 4
SEARCH_SEEDS = (1, 2)
ALPHA = 2  # for each rank
Row = dict[str, Any]


@dataclass(frozen=True)
class Patterned(Lora):
    """LoRA with a rank for each module."""

    ranks: tuple[tuple[str, int], ...] = ()

    def peft_options(self, base_model: Any) -> dict[str, Any]:
        ranks = {f"^{re.escape(name)}$": rank for name, rank in self.ranks}
        alphas = {name: ALPHA * rank for name, rank in ranks.items()}
        return {**super().peft_options(base_model), "rank_pattern": ranks, "alpha_pattern": alphas}


class Run(NamedTuple):
    part: str
    """``search`` or ``test``."""
    configuration: str
    learning_rate: float
    seed: int


def plan(options: argparse.Namespace) -> None:
    """Ask `advise` of each original, and write what is trained."""
    import msplora_analysis as ma

    found = {}
    for path in options.originals:
        (advice,) = ma.advise(path)
        spectra = ma.load_spectra(path)
        spectra = spectra[spectra["step"] == spectra["step"].max()].sort_values("sigma", ascending=False)
        names = sorted(spectra["name"].unique())
        full = dict.fromkeys(names, 8)
        configurations = {"r8": full, "r4": dict.fromkeys(names, 4), "r1": dict.fromkeys(names, 1)}
        configurations["advised"] = dict.fromkeys(names, advice.rank)
        ranks = next((a.value for a in advice.answers if a.question == "Do modules need different ranks?"), None)
        if ranks:
            n, total = len(names), sum(ranks.values())
            even = {name: (i + 1) * total // n - i * total // n for i, name in enumerate(names)}
            plain = dict.fromkeys(names, 1)
            for name in spectra.loc[spectra["k"] > 1, "name"].iloc[: total - n]:
                plain[name] += 1
            configurations |= {"pattern": {name: ranks[name] for name in names}, "even": even, "plain": plain}
        if advice.rank == 4:
            del configurations["advised"]
        task = json.loads((Path(path) / "run.json").read_text())["settings"]["task"]
        found[task] = {"advised": advice.rank, "configurations": configurations}
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "plan.json").write_text(json.dumps(found, indent=1) + "\n")


def train(options: argparse.Namespace) -> None:
    """Train what is not trained yet, the tasks in turn; after --minutes start none."""
    everything = json.loads((options.folder / "plan.json").read_text())
    rows = {task: {_run(row): row for row in read_rows(options.folder / f"{task}.csv")} for task in options.tasks}
    for task in options.tasks:
        for seed in SEARCH_SEEDS:
            hold_out(task, seed, options, most=None)
    end = time.monotonic() + 60 * options.minutes
    running: dict[Future[Row], tuple[str, Run]] = {}
    failed: set[tuple[str, Run]] = set()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["msplora_core.train.training"])  # imported once, for all of them
    with ProcessPoolExecutor(options.jobs, processes) as pool:
        while True:
            for task in options.tasks if time.monotonic() < end else ():
                configurations = everything[task]["configurations"]
                names = [name for name in configurations if name in (options.configurations or configurations)]
                for run in wanted(names, rows[task], options):
                    key = (task, run)
                    taken = run in rows[task] or key in failed | set(running.values())
                    if len(running) < options.jobs and not taken:
                        running[pool.submit(train_one, task, run, configurations[run.configuration], options)] = key
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


def wanted(configurations: list[str], rows: dict[Run, Row], options: argparse.Namespace) -> Iterator[Run]:
    """The searches of all configurations, then a test seed of all after the other; what can be told by now."""
    tests = []
    for configuration in configurations:
        rates, best = search(configuration, rows)
        yield from (Run("search", configuration, rate, seed) for rate in rates for seed in SEARCH_SEEDS)
        tested = options.rates or [best] * (best is not None)
        tests += [(configuration, rate) for rate in tested]
    for seed in options.seeds:
        yield from (Run("test", *test, seed) for test in tests)


def search(configuration: str, rows: dict[Run, Row]) -> tuple[list[float], float | None]:
    """The rates to try, and when all are tried the best of them."""
    rates = list(FIRST)
    while all(Run("search", configuration, rate, seed) in rows for rate in rates for seed in SEARCH_SEEDS):
        scores = {rate: mean_score(configuration, rate, rows) for rate in rates}
        best = max(rates, key=lambda rate: scores[rate])
        if len(rates) == MOST or min(rates) < best < max(rates):
            return rates, best
        rates.append(RATES[RATES.index(best) + (1 if best == max(rates) else -1)])
    return rates, None


def mean_score(configuration: str, rate: float, rows: dict[Run, Row]) -> float:
    """The mean metric of a rate; the loss decides between equals, and training that diverged is the worst."""
    found = [rows[Run("search", configuration, rate, seed)] for seed in SEARCH_SEEDS]
    score = sum(float(row["last"]) - 1e-6 * float(row["loss"]) for row in found) / len(found)
    return score if math.isfinite(score) else -1.0


def train_one(task: str, run: Run, ranks: dict[str, int], options: argparse.Namespace) -> Row:
    """Train one run in a folder that is removed; returns its row."""
    import torch

    from msplora_core.run.settings import Settings
    from msplora_core.train.training import train

    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32, on a GPU
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the last run of this process took: those beside it need room
    most = max(ranks.values())
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            model=options.model,
            task=task,
            method=Patterned(rank=most, lora_alpha=ALPHA * most, ranks=tuple(ranks.items())),
            output_dir=Path(folder) / "run",
            data_dir=options.folder / "data" / f"seed-{run.seed}" if run.part == "search" else options.data_dir,
            seed=run.seed,
            epochs=options.epochs,
            learning_rate=run.learning_rate,
        )
        results = train(settings, report=lambda line: None)
        record = json.loads((settings.output_dir / "run.json").read_text())
    rows = {name: data["rows"] for name, data in record["data"].items()}
    return (
        {"task": task}
        | run._asdict()
        | {"parameters": record["parameters"]["adapter"], "metric": record["metric"]["name"]}
        | {"last": results[-1].metric, "best": max(result.metric for result in results)}
        | {"loss": results[-1].validation_loss, "train_loss": results[-1].train_loss}
        | {"train_rows": rows["train"], "scored_rows": rows["validation"], "epochs": results[-1].epoch}
    )


def tables(options: argparse.Namespace) -> None:
    """Write advice_tried.csv: of each task and configuration the scores, and the difference to r8 and to even."""
    import pandas as pd
    from scipy.stats import t

    found = []
    for task, planned in json.loads((options.folder / "plan.json").read_text()).items():
        rows = read_rows(options.folder / f"{task}.csv")
        runs = {_run(row): row for row in rows}
        scores, about = {}, {}
        for name in planned["configurations"]:
            _, rate = search(name, runs)
            own = {run.seed: row for run, row in runs.items() if run[:3] == ("test", name, rate)}
            scores[name] = pd.Series({seed: float(row["last"]) for seed, row in own.items()})
            about[name] = {"parameters": next(iter(own.values()))["parameters"], "learning_rate": rate}
        for name, own in scores.items():
            row = {"task": task, "configuration": name} | about[name]
            row |= {"seeds": len(own), "mean": own.mean(), "sd": own.std(), "lowest": own.min()}
            for other in ("r8", "even"):
                if other in scores and other != name:
                    paired = (own - scores[other]).dropna()
                    half = t.ppf(0.975, len(paired) - 1) * paired.std() / len(paired) ** 0.5
                    low, high = paired.mean() - half, paired.mean() + half
                    row |= {f"to_{other}": paired.mean(), f"to_{other}_low": low, f"to_{other}_high": high}
            found.append(row)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "advice_tried.csv"
    pd.DataFrame(found).to_csv(path, index=False, float_format="%.4f", lineterminator="\n")


def _run(row: Row) -> Run:
    return Run(row["part"], row["configuration"], float(row["learning_rate"]), int(row["seed"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_suffix(""), help="where the tables go")
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("plan").add_argument("originals", nargs="+")
    training = parts.add_parser("train")
    training.add_argument("--data-dir", type=Path, required=True, help="folder with {task}_train.jsonl[.gz]")
    training.add_argument("--model", default="minilm", help="as msplora-train takes it (default: minilm)")
    training.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    training.add_argument("--seeds", nargs="+", type=int, default=list(range(11, 21)), help="default: 11 to 20")
    training.add_argument("--epochs", type=int, default=10)
    training.add_argument("--configurations", nargs="+", help="default: all of the plan")
    training.add_argument("--rates", nargs="+", type=float, help="test seeds at these, in place of the best")
    training.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    training.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    redrawing = parts.add_parser("tables")
    redrawing.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "figures" / "calibration")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    given = _options()
    {"plan": plan, "train": train, "tables": tables}[given.part](given)
