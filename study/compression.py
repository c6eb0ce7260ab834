"""What cutting the rank of a trained adapter does to its task: the measurement of docs/export.md.

    python study/compression.py --runs runs/study/runs --data-dir glue      # runs of study/study.py
    python study/compression.py figures                                # redraw from results.csv

Every final adapter is cut by `compress`, to equal ranks and to the same number of parameters placed where they lower
the error most, and evaluated on the validation split by plain PEFT, without training. Call it again to go on:
evaluations that are in results.csv are not made again.

    FOLDER/results.csv        one row per evaluation, with seed, ranks, error and metric
    FOLDER/versions.json      what computed it: model, weights, data, versions
    FOLDER/metric_<task>.png  metric against parameters
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

METHODS = ("lora-8", "msplora-8-4-2", "msplora-8-8-8")
LABELS = {"lora-8": "LoRA r=8", "msplora-8-4-2": "MSPLoRA 8/4/2", "msplora-8-8-8": "MSPLoRA 8/8/8"}
METRICS = {"cola": "Matthews correlation", "mrpc": "accuracy", "stsb": "Pearson correlation"}
# how: "trained" (all of the adapter), "rank" (the same for every module), "budget" (as many parameters as that rank).
COLUMNS = ("task", "method", "seed", "how", "rank", "parameters", "error", "metric", "metric_in_training")


def main() -> None:
    options = _options()
    if "evaluate" in options.steps:
        evaluate(options)
    if "figures" in options.steps:
        draw(options)


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate whatever is not in results.csv yet, one seed of all after the other."""
    import torch

    from msplora_core.data.tasks import get_task
    from msplora_core.models import find_model, load_model

    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.csv"
    done = {_key(row) for row in _rows(results)}
    source = find_model(options.model)
    _write_versions(options, source.fingerprint())
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not done:
            writer.writeheader()
        for name in options.tasks:
            task = get_task(name)
            base, tokenizer = load_model(source, task)
            batches = _batches(task, tokenizer, options.data_dir)
            for run in (options.runs / name / method / f"seed-{seed}" for seed in options.seeds for method in METHODS):
                for row, folder in _adapters(run, name, options.ranks, done):
                    row["metric"] = _metric(base, folder, task, batches)
                    writer.writerow(row)
                    file.flush()
                    print(*(f"{row[column]:.4g}" if isinstance(row[column], float) else row[column] for column in row))


def _adapters(
    run: Path, task: str, ranks: list[int], done: set[tuple[str, ...]]
) -> Iterator[tuple[dict[str, Any], Path]]:
    """The adapter of a run, plain and cut in every way, but for what is done; a row without metric, and a folder."""
    import msplora_analysis as ma

    record = json.loads((run / "run.json").read_text())
    row = {"task": task, "method": run.parent.name, "seed": int(run.name.removeprefix("seed-"))}
    row_end = {"metric": None, "metric_in_training": record["results"][-1]["metric"]}
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        whole = ma.export(newest, folder)
        full, per_rank = int(whole["rank"].max()), int((whole["rows"] + whole["cols"]).sum())
        plain = {"how": "trained", "rank": full, "parameters": int(whole["parameters"].sum()), "error": 0.0}
        if _key(row | plain) not in done:
            yield row | plain | row_end, folder
        for rank in (rank for rank in ranks if rank < full):
            for how, choice in (("rank", {"rank": rank}), ("budget", {"budget": rank * per_rank})):
                cut = {"how": how, "rank": rank}
                if _key(row | cut) in done:
                    continue
                table = ma.compress(newest, folder, overwrite=True, **choice)
                lost, norm = ((table["norm"] * table["error"]) ** 2).sum(), (table["norm"] ** 2).sum()
                cut |= {"parameters": int(table["parameters"].sum()), "error": float((lost / norm) ** 0.5)}
                yield row | cut | row_end, folder


def _batches(task: Any, tokenizer: Any, data_dir: Path, size: int = 64) -> list[dict[str, Any]]:
    """The validation split in batches of like lengths."""
    from transformers import DataCollatorWithPadding

    from msplora_core.data.encoding import tokenize
    from msplora_core.data.loading import load_splits

    examples = tokenize(load_splits(task, data_dir)["validation"], task, tokenizer, max_length=256)
    examples.sort(key=lambda example: len(example["input_ids"]))
    collate = DataCollatorWithPadding(tokenizer)
    return [collate(examples[i : i + size]) for i in range(0, len(examples), size)]


def _metric(base: Any, folder: Path, task: Any, batches: list[dict[str, Any]]) -> float:
    """The task's metric of plain PEFT's model of an adapter."""
    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import EvalPrediction

    from msplora_core.data.evaluation import metric_function

    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload().eval()
    with torch.inference_mode():
        logits = [model(**{k: v for k, v in batch.items() if k != "labels"}).logits.numpy() for batch in batches]
    labels = np.concatenate([batch["labels"].numpy() for batch in batches])
    return metric_function(task)(EvalPrediction(np.concatenate(logits), labels))[task.metric]


def _write_versions(options: argparse.Namespace, weights: dict[str, str]) -> None:
    packages = ("torch", "transformers", "peft", "numpy", "scikit-learn")
    record = {
        "model": options.model,
        "weights_sha256": weights,
        "seeds": options.seeds,
        "precision": "float32, CPU",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    (options.out / "versions.json").write_text(json.dumps(record, indent=2) + "\n")


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in ("task", "method", "seed", "how", "rank"))


def draw(options: argparse.Namespace) -> None:
    """One figure per task: metric against parameters, mean over seeds and the range of them."""
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.ticker import FuncFormatter, NullFormatter

    results = pd.read_csv(options.out / "results.csv")
    for task, rows in results.groupby("task"):
        figure, axes = plt.subplots(1, len(METHODS), figsize=(9.5, 3.1), sharey=True, layout="constrained")
        for axis, method in zip(axes, METHODS, strict=True):
            of_method = rows[rows["method"] == method]
            trained = of_method.loc[of_method["how"] == "trained", "metric"]
            axis.axhspan(trained.min(), trained.max(), color="0.9", zorder=0)
            axis.axhline(trained.mean(), color="0.4", linewidth=1, label="as trained")
            for how, colour, marker, label, shift in (
                ("rank", "#0072b2", "o", "same rank everywhere", 0.97),
                ("budget", "#d55e00", "s", "same parameters, placed by error", 1.03),
            ):
                points = of_method[of_method["how"] == how].groupby("rank")["metric"].agg(["mean", "min", "max"])
                axis.errorbar(
                    points.index * shift,
                    points["mean"],
                    yerr=[points["mean"] - points["min"], points["max"] - points["mean"]],
                    color=colour, marker=marker, markersize=4, linewidth=1.2, capsize=2, label=label,
                )  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_xlim(0.85, 1.2 * rows.loc[rows["how"] == "rank", "rank"].max())
            axis.set_xticks(sorted(rows.loc[rows["how"] == "rank", "rank"].unique()))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(f"{LABELS[method]} (rank {of_method['rank'].max()} as LoRA)", fontsize=9)
            axis.set_xlabel("rank kept, or as many parameters", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(METRICS[str(task)], fontsize=9)
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
        )
        path = options.out / f"metric_{task}.png"
        figure.savefig(path, dpi=160)
        plt.close(figure)
        print(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", default=["evaluate", "figures"], help="evaluate, figures; default both")
    parser.add_argument("--runs", type=Path, default=Path("runs/study/runs"), help="folder of the study's runs")
    parser.add_argument("--data-dir", type=Path, help="GLUE as JSON Lines; default: from the Hub")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "compression")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--tasks", nargs="+", default=["cola", "mrpc"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.runs = options.runs / options.model
    return options


if __name__ == "__main__":
    main()
