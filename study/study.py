"""The study of docs/study.md: train its runs, make its tables, draw its figures.

    python study/study.py --data-dir glue --jobs 4        # or: make study GLUE=glue
    python study/study.py figures --tables figures/study --figures figures    # redraw the published figures

Call it again to go on: complete runs are skipped, runs that were cut off continue from their newest epoch. With
`--minutes 10` it stops by itself. What is not asked for (models, tasks, methods, seeds) is left as it is.

    FOLDER/runs/<model>/<task>/<method>/seed-<n>/     run folders of msplora-train; a .log beside each
    FOLDER/tables/results.csv                         one row per run
    FOLDER/tables/<model>/                            tables of msplora-analyze, and overlap_over_epochs.csv
    FOLDER/figures/<model>/                           figures, each with its numbers as CSV
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Plan:
    """How a model is trained; all else is the recipe of msplora-train."""

    seeds: tuple[int, ...]
    epochs: int
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


MODELS = {
    "minilm": Plan(seeds=(1, 2, 3, 4, 5), epochs=20),
    # On a GPU, matrix products in TF32: the published runs of this model had them.
    "smollm2": Plan((1, 2, 3), 6, ("--learning-rate", "1e-3"), {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}),
}
TASKS = ("cola", "mrpc", "stsb")
METHODS = {
    "lora-8": ("--method", "lora", "--rank", "8"),
    "lora-2": ("--method", "lora", "--rank", "2"),
    "msplora-8-4-2": ("--method", "msplora", "--ranks", "8,4,2"),
    "msplora-8-8-8": ("--method", "msplora", "--ranks", "8,8,8"),
}
COMPARED = (("msplora-8-8-8", "lora-8"), ("msplora-8-4-2", "lora-8"), ("msplora-8-4-2", "lora-2"))
METRICS = {"cola": "Matthews correlation", "mrpc": "accuracy", "stsb": "Pearson correlation"}
# Of what `msplora-analyze figures` draws, left out to keep the folder small; the first compares 8 values with 2.
NOT_KEPT = (
    "figure4_msplora-8-8-8_minus_lora-2*",
    "kl_between_layers_*",
    "effective_rank_map_lora-2.*",
    "effective_rank_map_msplora-8-4-2.*",
    "overlap_between_layers_lora-2.*",
    "overlap_between_layers_msplora-8-4-2.*",
)


def main() -> None:
    options = _options()
    failed = train(options) if "train" in options.steps else []
    if "tables" in options.steps:
        tables(options)
    if "figures" in options.steps:
        figures(options)
    if failed:
        sys.exit(f"failed: {', '.join(failed)} (see the .log beside each run)")


def train(options: argparse.Namespace) -> list[str]:
    """Train what is not complete, `--jobs` at a time, until done or out of `--minutes`. Returns what failed."""
    todo = {name: command for name, command in _runs(options) if not _is_complete(options.runs / name, command)}
    total = sum(1 for _ in _runs(options))
    end = time.monotonic() + 60 * options.minutes
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    waiting = list(todo)
    print(f"{total - len(todo)} of {total} runs are complete", flush=True)
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < options.jobs:
                name = waiting.pop(0)
                running[name] = _start(name, todo[name], options)
            time.sleep(0.2)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    failed += [name] * (process.returncode != 0)
                    print(f"{name}: {'failed' if process.returncode else 'complete'}", flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if running or waiting:
        sys.exit(f"{len(running) + len(waiting)} runs are left: call again to go on")
    return failed


def _runs(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Name and command of each run; one seed of all after the other, so that a study cut short is even."""
    for seed in sorted({seed for model in options.models for seed in MODELS[model].seeds}):
        if options.seeds and seed not in options.seeds:
            continue
        for model in options.models:
            plan = MODELS[model]
            for task in options.tasks if seed in plan.seeds else ():
                for method in options.methods:
                    command = [sys.executable, "-m", "msplora_core.cli", "--model", model, "--task", task]
                    command += ["--seed", str(seed), "--epochs", str(options.epochs or plan.epochs)]
                    command += [*METHODS[method], *plan.options]
                    command += ["--data-dir", str(options.data_dir)] if options.data_dir else []
                    yield f"{model}/{task}/{method}/seed-{seed}", command


def _is_complete(run: Path, command: list[str]) -> bool:
    """Whether run.json holds the results of so many epochs; msplora-train compares the other settings."""
    record = run / "run.json"
    if not record.is_file():
        return False
    epochs = int(command[command.index("--epochs") + 1])
    return [result["epoch"] for result in json.loads(record.read_text()).get("results", [])] == list(range(epochs + 1))


def _start(name: str, command: list[str], options: argparse.Namespace) -> subprocess.Popen[bytes]:
    folder = options.runs / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {'continues' if folder.exists() else 'starts'}", flush=True)
    with folder.with_name(f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--resume", "--output-dir", str(folder)],
            **{"stdout": log, "stderr": log},
            env={**os.environ, **MODELS[name.partition("/")[0]].environment},
        )


def tables(options: argparse.Namespace) -> None:
    """Every table of the runs that are there."""
    from msplora_analysis import load_metrics
    from msplora_analysis.tables.files import write_table
    from msplora_analysis.tables.pairs import load_redundancy

    results(options.runs, options.tables / "results.csv")
    for model in MODELS:
        runs = options.runs / model
        if not runs.is_dir():
            continue
        out = options.tables / model
        _analyze("spectra", runs, "--out", out)
        # Pairs of the last epoch, in float32: of all, in float64, they would be many times larger than the spectra.
        pairs, scales = load_redundancy(runs, details=True, workers=None)
        last = pairs["epoch"] == pairs.groupby("run")["epoch"].transform("max")
        small = dict.fromkeys(pairs.select_dtypes("float64"), "float32")
        write_table(pairs[last].reset_index(drop=True).astype(small), out / "pairs.parquet")
        if len(scales):
            write_table(scales, out / "scales.parquet")
        overlap = overlap_over_epochs(
            load_redundancy(runs, top_k=2, details=True, workers=None).pairs, load_metrics(runs)
        )
        overlap.to_csv(out / "overlap_over_epochs.csv", index=False, float_format="%.6g", lineterminator="\n")
        for a, b in COMPARED:
            sides = [sorted(map(str, runs.glob(f"*/{method}"))) for method in (a, b)]
            if all(sides):
                folder = out / f"{a}_minus_{b}"
                _analyze("compare", *sides[0], "--with", *sides[1], "--out", folder, "--format", "csv")


def results(runs: Path, path: Path) -> None:
    """One row per complete run, from its run.json."""
    rows = []
    for file in sorted(runs.glob("*/*/*/*/run.json")):
        record = json.loads(file.read_text())
        if "results" not in record:
            continue
        model, task, method, _ = name = file.parent.relative_to(runs).parts
        settings, epochs = record["settings"], record["results"]
        best = max(epochs, key=lambda result: result["metric"])
        tf32 = bool(MODELS[model].environment) and record["device"].startswith("NVIDIA")
        rows.append(
            {"run": "/".join(name), "model": model, "task": task, "method": method, "seed": settings["seed"]}
            | {"adapter_parameters": record["parameters"]["adapter"], "epochs": settings["epochs"]}
            | {"learning_rate": settings["learning_rate"], "metric": METRICS[task], "last": epochs[-1]["metric"]}
            | {"best": best["metric"], "best_epoch": best["epoch"]}
            | {"last_validation_loss": epochs[-1]["validation_loss"], "last_train_loss": epochs[-1]["train_loss"]}
            | {"seconds": record["seconds"], "device": record["device"], "precision": settings["precision"]}
            | {"matrix_products": "tf32" if tf32 else settings["precision"]}
            | {library: record["versions"][library] for library in ("torch", "transformers", "peft")}
        )
    if not rows:
        sys.exit(f"{runs}: no complete run; train first")
    _write_csv(rows, path)
    _write_csv(list(_differences(rows)), path.with_name("differences.csv"))


def _differences(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Difference of the last metric between two methods, over pairs of one seed, with its 95 % t interval."""
    import numpy as np
    from scipy import stats

    last = {row["run"]: row["last"] for row in rows}
    for model, task, (a, b) in itertools.product(MODELS, TASKS, COMPARED):
        both = [(f"{model}/{task}/{a}/seed-{seed}", f"{model}/{task}/{b}/seed-{seed}") for seed in MODELS[model].seeds]
        values = [last[one] - last[other] for one, other in both if one in last and other in last]
        if len(values) > 1:
            mean, error = float(np.mean(values)), float(stats.sem(values))
            low, high = (mean + float(stats.t.ppf(q, len(values) - 1)) * error for q in (0.025, 0.975))
            yield {"model": model, "task": task, "a": a, "b": b, "pairs": len(values)} | {
                name: f"{value:.6g}" for name, value in (("difference", mean), ("low", low), ("high", high))
            }


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def overlap_over_epochs(pairs: Any, metrics: Any) -> Any:
    """One row per run and epoch: overlap beyond chance of the layer parts (top 2 directions), and their norm."""
    keys = ["run", "epoch"]
    layers = pairs[pairs["scale"] == "layer"].dropna(subset=["overlap_in"])
    for side in ("in", "out"):
        layers = layers.assign(**{side: layers[f"overlap_{side}"] - layers[f"expected_{side}"]})
    adjacent = layers[(layers["group_j"] - layers["group_i"]) == 1]
    of_all = layers.groupby(keys)[["in", "out"]].mean().add_prefix("overlap_").add_suffix("_all")
    of_adjacent = adjacent.groupby(keys)[["in", "out"]].mean().add_prefix("overlap_").add_suffix("_adjacent")
    norm = metrics[metrics["scale"] == "layer"].groupby(keys)["frobenius"].mean()
    return of_all.join([of_adjacent, norm]).reset_index()


def figures(options: argparse.Namespace) -> None:
    """Every figure of the tables that are there."""
    import pandas as pd

    from msplora_analysis.show.figures import comparison

    for model in MODELS:
        folder, out = options.tables / model, options.figures / model
        if not (folder / "spectra.parquet").is_file():
            continue
        _analyze("figures", folder, "--out", out, *(part for name in options.formats for part in ("--format", name)))
        for pattern in NOT_KEPT:
            for path in out.glob(pattern):
                path.unlink()
        for path in sorted(folder.glob("*_minus_*/comparison.csv")):
            for plot in comparison.plots(pd.read_csv(path)):
                replace(plot, stem=f"comparison_{path.parent.name}").write(out, options.formats)


def _analyze(*arguments: str | Path) -> None:
    command = ["msplora-analyze", *map(str, arguments)]
    print(re.sub(r"(( \S+){4})( \S+){4,}( \S+)", r"\1 ...\4", " ".join(command)), flush=True)
    code = "from msplora_analysis.cli import main; main()"
    printed = None if arguments[0] == "compare" else subprocess.DEVNULL
    if subprocess.run([sys.executable, "-c", code, *command[1:]], stdout=printed).returncode:
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ("train", "tables", "figures")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(every)}; all if none is named")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="where all goes (default: runs/study)")
    for name in ("runs", "tables", "figures"):
        parser.add_argument(f"--{name}", type=Path, help=f"folder of the {name}, if not FOLDER/{name}")
    parser.add_argument("--data-dir", type=Path, help="folder with {task}_train.jsonl[.gz] and so on; else the Hub")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop training after so long")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 1-5 for minilm, 1-3 for smollm2")
    parser.add_argument("--epochs", type=int, help="default: 20 for minilm, 6 for smollm2")
    parser.add_argument("--formats", nargs="+", choices=("png", "pdf", "svg"), default=["png"])
    options = parser.parse_args()
    if wrong := set(options.steps) - set(every):
        parser.error(f"unknown step {', '.join(wrong)}: choose from {', '.join(every)}")
    options.steps = options.steps or every
    for name in ("runs", "tables", "figures"):
        setattr(options, name, getattr(options, name) or options.folder / name)
    return options


if __name__ == "__main__":
    main()
