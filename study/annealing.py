"""Does it pay to train at rank 32 and end at rank 8? Adapters of all-MiniLM-L6-v2, for docs/anneal.md.

    python study/annealing.py train --data-dir glue --jobs 15      # two GPUs: --tasks qnli mrpc, and --tasks stsb sst2
    python study/annealing.py tables

All have equal steps: a step at rank 32 costs 3 % more floating-point operations than one at rank 8 (`cost`). They are

    lora-8             LoRA r 8, trained so
    lora-32            LoRA r 32: what the higher rank is worth, uncut
    cut, cut-task      that, cut to rank 8 after training: plain, and by moments of 512 training examples
    anneal             --anneal 32:8
    anneal-reset       with the averages of the optimiser forgotten
    anneal-task        by what the task asks
    anneal-gradual     --anneal 32:16:8

For each and each task the rates 3e-4, 1e-3 and 3e-3 are searched, and at most two more where the best of them is an
edge: seed 1 holds out a tenth of at most 3,000 training rows. Then fresh seeds train at the best rate on at most 4,000
rows and are scored once on at most 2,000 of the validation split (a shuffle with the seed 0 chooses both), at the last
of 6 epochs. Batches have 32 examples. It may be stopped and called again.

Files in --folder: <task>.csv, a row a training, appended as it ends. `tables` writes runs.csv, and of it annealing.csv
and annealing.png: the mean of paired differences to lora-8, with a 95 % interval by t over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

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

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST, MOST = (1e-3, 3e-4, 3e-3), 5
SEARCH_SEEDS, SEARCH_ROWS = (1,), 3000
RANK = 8
REFERENCE = "lora-8"
TRAINED: dict[str, dict[str, Any]] = {
    "lora-8": {"rank": RANK},
    "lora-32": {"rank": 32},
    "anneal": {"anneal": [32, RANK]},
    "anneal-reset": {"anneal": [32, RANK], "anneal_optimizer": "reset"},
    "anneal-task": {"anneal": [32, RANK], "anneal_by": "task"},
    "anneal-gradual": {"anneal": [32, 16, RANK]},
}
COMPARED = {"lora-8": ("lora-8", "last"), "lora-32": ("lora-32", "last")}
COMPARED |= {"cut": ("lora-32", "cut"), "cut-task": ("lora-32", "cut_task")}
COMPARED |= {name: (name, "last") for name in TRAINED}
"""What is compared: which training, and which column of its row."""
SEARCH = Search(RATES, FIRST, MOST, SEARCH_SEEDS)


def train(options: argparse.Namespace) -> None:
    """Train what is not trained yet."""
    train_wanted(options, SEARCH, SEARCH_ROWS, partial(wanted, options), train_one)


def wanted(options: argparse.Namespace, task: str, rows: dict[Run, Row]) -> Iterator[Run]:
    """The searches of all, then a test seed of all after the other; what can be told by now."""
    tests: dict[tuple[str, float], None] = {}
    for trained, column in COMPARED.values():
        rates, best = SEARCH.of(trained, rows, column)
        yield from (run for rate in rates for run in SEARCH.runs(trained, rate))
        tests |= {(trained, best): None} if best is not None else {}
    yield from (Run("test", *test, seed) for seed in options.seeds for test in tests)


def train_one(task: str, run: Run, options: argparse.Namespace) -> Row:
    """Train one run in a folder that is removed; returns its row."""
    from msplora_core.methods.lora import Lora

    def look(folder: Path) -> Row:
        cuts = json.loads((folder / "run.json").read_text()).get("cuts", [])
        after = cut_after(folder) if run.configuration == "lora-32" else {"cut": None, "cut_task": None}
        return {**after, "kept": " ".join(f"{cut['kept']:.4f}" for cut in cuts)}

    method, data = Lora(**TRAINED[run.configuration]), data_of(run, options)
    return train_run(task, run, options, look, method=method, data_dir=data, batch_size=options.batch_size)


def cut_after(run: Path) -> dict[str, float]:
    """The metric of a run's last adapter cut to the lower rank, by the plain and by the task-weighted spectrum."""
    from msplora_core.measure.ablation import ablate
    from msplora_core.measure.cuts import standard_cuts
    from msplora_core.measure.loading import load_subject
    from msplora_core.measure.recording import record_moments
    from msplora_core.measure.updates import updates_of

    subject = load_subject(run)
    moments = record_moments(subject.model, subject.batches("train", 512))
    cuts = [cut for cut in standard_cuts(updates_of(subject.model), [RANK], task=True) if cut.cut.startswith("rank")]
    found = ablate(subject.model, subject.batches("validation", by_length=True), cuts=cuts, moments=moments)
    table = found.table(subject.task.metric).set_index("cut")["metric"]
    return {"cut": float(table["rank"]), "cut_task": float(table["rank_task"])}


def cost(options: argparse.Namespace) -> None:
    """Print how many operations a step has more at rank 32 than at rank 8, as PyTorch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from msplora_core.data.tasks import get_task
    from msplora_core.methods.lora import Lora
    from msplora_core.models import find_model, load_model

    counts = {}
    for rank in (8, 32):
        task = get_task("cola")
        base, _ = load_model(find_model(options.model), task)
        model = Lora(rank=rank, lora_alpha=16, lora_dropout=0.0).adapt(base, task.peft_task_type)
        ids = torch.full((8, 32), 100)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=torch.zeros(8, dtype=torch.long)).loss.backward()
        counts[rank] = counter.get_total_flops()
    print(f"{counts}: {counts[32] / counts[8] - 1:.1%} more")


def tables(options: argparse.Namespace) -> None:
    """Write runs.csv of the rows, if there are any, and of runs.csv the table and its picture."""
    import pandas as pd
    from paired import beside, draw, groups_of, means_of

    tests = all_runs(options, TASKS).query("part == 'test'").set_index(["task", "seed"])
    columns = {name: tests.loc[tests["configuration"] == of, column] for name, (of, column) in COMPARED.items()}
    scores = pd.DataFrame(columns).dropna()
    groups = groups_of([task for task in TASKS if task in scores.index.get_level_values("task")], without="stsb")
    table = beside(scores, REFERENCE, groups)
    table.round(5).to_csv(options.out / "annealing.csv", index=False, lineterminator="\n")
    draw(
        table, options.out / "annealing.png", "metric × 100, difference to LoRA r = 8 (paired by seed, 95 % intervals)"
    )
    print(table.to_string())
    print({name: round(of[REFERENCE], 4) for name, of in means_of(scores, groups).items()}, f"{len(scores)} runs")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/annealing"), help="where the rows go (runs/annealing)"
    )
    parser.add_argument("--model", default="minilm", help="as msplora-train takes it (default: minilm)")
    parts = parser.add_subparsers(dest="part", required=True)
    training = parts.add_parser("train")
    training_options(training, seeds=range(11, 16), tasks=TASKS, batch_size=32)
    training.add_argument("--epochs", type=int, default=6)
    parts.add_parser("cost")
    drawing = parts.add_parser("tables")
    drawing.add_argument("--out", type=Path, default=Path("figures/annealing"), help="default: figures/annealing")
    return parser.parse_args()


if __name__ == "__main__":
    call({"train": train, "cost": cost, "tables": tables}, _options())
