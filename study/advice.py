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
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from searched import Row, Run, Search, prepare_process, read_runs, train_wanted

from msplora_core.methods.lora import Lora

TASKS = ("cola", "stsb", "mrpc", "rte")  # the longest first
RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
FIRST, MOST = (1e-3, 5e-4, 2e-3), 4
SEARCH_SEEDS = (1, 2)
ALPHA = 2  # for each rank
SEARCH = Search(RATES, FIRST, MOST, SEARCH_SEEDS)
Configurations = dict[str, dict[str, int]]
"""Of a task, by name: the rank of each module."""


@dataclass(frozen=True)
class Patterned(Lora):
    """LoRA with a rank for each module."""

    ranks: tuple[tuple[str, int], ...] = ()

    def peft_options(self, base_model: Any) -> dict[str, Any]:
        ranks = {f"^{re.escape(name)}$": rank for name, rank in self.ranks}
        alphas = {name: ALPHA * rank for name, rank in ranks.items()}
        return {**super().peft_options(base_model), "rank_pattern": ranks, "alpha_pattern": alphas}


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
    """Train what is not trained yet."""
    plan = json.loads((options.folder / "plan.json").read_text())
    configurations = {task: plan[task]["configurations"] for task in options.tasks}
    train_wanted(options, SEARCH, None, partial(wanted, options, configurations), partial(train_one, configurations))


def wanted(
    options: argparse.Namespace, configurations: dict[str, Configurations], task: str, rows: dict[Run, Row]
) -> Iterator[Run]:
    """The searches of all configurations, then a test seed of all after the other; what can be told by now."""
    tests = []
    for name in configurations[task]:
        if name in (options.configurations or configurations[task]):
            rates, best = SEARCH.of(name, rows)
            yield from (run for rate in rates for run in SEARCH.runs(name, rate))
            tests += [(name, rate) for rate in options.rates or [best] * (best is not None)]
    for seed in options.seeds:
        yield from (Run("test", *test, seed) for test in tests)


def train_one(configurations: dict[str, Configurations], task: str, run: Run, options: argparse.Namespace) -> Row:
    """Train one run in a folder that is removed; returns its row."""
    from msplora_core.run.settings import Settings
    from msplora_core.train.training import train

    prepare_process()
    ranks = configurations[task][run.configuration]
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
        runs = read_runs(options, task)
        scores, about = {}, {}
        for name in planned["configurations"]:
            _, rate = SEARCH.of(name, runs)
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
