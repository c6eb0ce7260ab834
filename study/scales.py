"""What each scale of MSPLoRA is worth, on all-MiniLM-L6-v2: which scales, how many groups, which ranks, which steps.

    python study/scales.py train --data-dir glue --jobs 15      # two GPUs: --tasks qnli mrpc, and --tasks stsb sst2
    python study/scales.py tables

A configuration has ranks of the scales global, mid, layer; all else is the recipe, alpha 16 for every scale.

    which       8/4/2 whole, and each scale and each two scales of it alone
    groups      8/4/2 with 1, 2 and 6 mid groups instead of 3
    ranks       falling (20/10/5), equal (8/8/8) and rising (2/6/10) ranks: 122,880 parameters each, on six layers
    steps       8/4/2 of equal steps. The update of a scale has the factor alpha / rank: 2, 4 and 8, and a step of the
                optimiser moves it so much more. Here the factor is 2 for each (as LoRA r 8 has), or 2 for their sum

For each and each task the rates 3e-4 and 1e-3 are searched, and the next where the better one is an edge, three in all:
seed 1 holds out a tenth of at most 2,000 training rows. Then fresh seeds train at the better rate on at most 4,000 rows
and are scored once on at most 2,000 of the validation split (a shuffle with the seed 0 chooses both), at the last of 10
epochs. Batches have 32 examples. It may be stopped and called again.

Files in --folder: <task>.csv, a row a training, appended as it ends. `tables` writes runs.csv, and of it scales.csv and
scales.png: the mean of paired differences to 8/4/2, with a 95 % interval by t over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from calibration import base_model
from searched import (
    TASKS,
    Row,
    Run,
    Search,
    all_runs,
    call,
    data_of,
    train_run,
    train_wanted,
    training_options,
)

from msplora_core.methods.msplora import MSPLora

SEARCH = Search((3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (1e-3, 3e-4), 3, (1,))
SEARCH_ROWS = 2000
WHOLE = {"global": 8, "mid": 4, "layer": 2}
REFERENCE = "8/4/2"


@dataclass(frozen=True)
class Scaled(MSPLora):
    """MSPLoRA with settings that msplora-train has not."""

    groups: int = 3
    """Mid groups."""
    scaling: float | None = None
    """The factor of every scale; None: alpha / rank."""

    def peft_options(self, base_model: Any) -> dict[str, Any]:
        return super().peft_options(base_model) | {"mid_groups": self.groups}

    def adapt(self, base_model: Any, task_type: str) -> Any:
        model = super().adapt(base_model, task_type)
        for module in model.modules():
            if self.scaling is not None and hasattr(module, "msplora_layer"):
                module.scaling["default"] = dict.fromkeys(module.scaling["default"], self.scaling)
        return model


def _of(*scales: str) -> dict[str, Any]:
    return {"ranks": {scale: WHOLE[scale] for scale in scales}}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    REFERENCE: _of("global", "mid", "layer"),
    "global 8": _of("global"),
    "mid 4": _of("mid"),
    "layer 2": _of("layer"),
    "global 8, mid 4": _of("global", "mid"),
    "global 8, layer 2": _of("global", "layer"),
    "mid 4, layer 2": _of("mid", "layer"),
    "1 mid group": {"ranks": WHOLE, "groups": 1},
    "2 mid groups": {"ranks": WHOLE, "groups": 2},
    "6 mid groups": {"ranks": WHOLE, "groups": 6},
    "falling 20/10/5": {"ranks": {"global": 20, "mid": 10, "layer": 5}},
    "equal 8/8/8": {"ranks": {"global": 8, "mid": 8, "layer": 8}},
    "rising 2/6/10": {"ranks": {"global": 2, "mid": 6, "layer": 10}},
    "factor 2 each": {"ranks": WHOLE, "scaling": 2.0},
    "factor 2 in all": {"ranks": WHOLE, "lora_alpha": 16 / 7},
}


def train(options: argparse.Namespace) -> None:
    """Train what is not trained yet."""
    options.model = str(base_model("minilm", options))
    train_wanted(options, SEARCH, SEARCH_ROWS, partial(wanted, options), train_one)


def wanted(options: argparse.Namespace, task: str, rows: dict[Run, Row]) -> Iterator[Run]:
    """The searches of all, then a test seed of all after the other; what can be told by now."""
    tests = []
    for name in options.configurations:
        rates, best = SEARCH.of(name, rows)
        yield from (run for rate in rates for run in SEARCH.runs(name, rate))
        tests += [(name, best)] * (best is not None)
    yield from (Run("test", *test, seed) for seed in options.seeds for test in tests)


def train_one(task: str, run: Run, options: argparse.Namespace) -> Row:
    """Train one run; returns its row."""
    method, data = Scaled(**CONFIGURATIONS[run.configuration]), data_of(run, options)
    return train_run(task, run, options, method=method, data_dir=data, batch_size=options.batch_size)


def tables(options: argparse.Namespace) -> None:
    """Write runs.csv of the rows, if there are any, and of runs.csv the table and its picture."""
    from paired import beside, draw, groups_of, means_of

    runs = all_runs(options, TASKS)
    scores = runs[runs["part"] == "test"].pivot_table(index=["task", "seed"], columns="configuration", values="last")
    scores = scores.reindex(columns=[name for name in CONFIGURATIONS if name in scores]).dropna()
    # On STS-B some trainings do not begin to learn in time, so that it decides the average.
    groups = groups_of([task for task in TASKS if task in scores.index.get_level_values("task")], without="stsb")
    table = beside(scores, REFERENCE, groups)
    parameters = runs.groupby("configuration")["parameters"].first()
    table["parameters"] = table["other"].map(parameters)
    table.round(5).to_csv(options.out / "scales.csv", index=False, lineterminator="\n")
    draw(table, options.out / "scales.png", "metric × 100, difference to 8/4/2 (paired by seed, 95 % intervals)")
    mean = means_of(scores, groups)["average"][REFERENCE]
    print(f"8/4/2: {parameters[REFERENCE]} parameters, mean {mean:.4f}, {len(scores)} runs")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/scales"), help="where the rows go (runs/scales)")
    parts = parser.add_subparsers(dest="part", required=True)
    training = parts.add_parser("train")
    training_options(training, seeds=[11, 12, 13], tasks=TASKS, batch_size=32)
    training.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    training.add_argument("--epochs", type=int, default=10)
    drawing = parts.add_parser("tables")
    drawing.add_argument("--out", type=Path, default=Path("figures/scales"), help="default: figures/scales")
    return parser.parse_args()


if __name__ == "__main__":
    call({"train": train, "tables": tables}, _options())
