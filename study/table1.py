"""Table 1 of the paper on a small model: eleven methods, six tasks of GLUE, all-MiniLM-L6-v2.

    python study/table1.py train --data-dir glue --jobs 15
    python study/table1.py tables                       # redraws the published ones from runs.csv
    python study/table1.py train --model smollm2 --methods lora-8 lora-2 msplora-8-4-2 --data-dir glue --jobs 6
    python study/table1.py tables --model smollm2       # published: of the runs of study/calibration.py

Every method has the learning rate that its search chose (study/learning_rates/), 10 epochs, and the recipe of the task
for all else; AdaLoRA and PiSSA their own settings. SmolLM2 has 3 epochs, and the rate of docs/study.md for all. The
searches read parts of *train* alone, so the validation split, scored at the last epoch, is a test set. `train` may be
stopped and called again, also several times at once on one folder, with other --seeds or on another GPU: what is
complete is skipped. One seed of all comes after the other.

Sizes. Of QNLI, whose train file is a tenth of the official one (10,475 rows), 5,000 rows are trained on and 2,000
scored; of SST-2 5,000 are trained on; a shuffle with the seed 0 chooses them. The other tasks are whole.

    FOLDER/models/<model>                               the base model, as a folder
    FOLDER/data/                                        the rows of the tasks that are cut
    FOLDER/runs/<model>/<task>/<method>/seed-<n>/       run folders of msplora-train, as study/calibration.py's

Kept of a low-rank method's run are the checkpoint before training and the last, each with adapter and head; of MRPC
under LoRA and MSPLoRA that of every epoch. Of the other methods only the record is kept.

On a GPU, matrix products are in TF32. Many small runs share one well under NVIDIA MPS (nvidia-cuda-mps-control -d).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paired
from calibration import MODELS, Part, Run, in_processes, is_trained, thin, train_with
from learning_rates import METHODS, TASKS, shuffled, write_rows
from searched import call, training_options

if TYPE_CHECKING:
    import pandas as pd

    from msplora_analysis.show.drawing.figure import Figure

SEEDS = (11, 12, 13, 14, 15)
CUT = {"qnli": {"train": 5000, "validation": 2000}, "sst2": {"train": 5000, "validation": None}}
WITHOUT_FACTORS = ("fft", "bitfit", "adapterdrop")
EVERY_EPOCH = (("mrpc", "lora-8"), ("mrpc", "msplora-8-4-2"))
NAMES = {
    "fft": "full fine-tuning",
    "bitfit": "BitFit",
    "adapterdrop": "AdapterDrop",
    "lora-8": "LoRA r = 8",
    "lora-5": "LoRA r = 5",
    "lora-2": "LoRA r = 2",
    "adalora": "AdaLoRA",
    "dylora": "DyLoRA",
    "pissa": "PiSSA",
    "lily": "Lily",
    "msplora-8-4-2": "MSPLoRA 8/4/2",
}
OURS = "msplora-8-4-2"
WITHOUT = "without STS-B"


def train(options: argparse.Namespace) -> None:
    """Train what is not complete."""
    for task, sizes in CUT.items():
        for split, most in sizes.items():
            path = options.folder / "data" / f"{task}_{split}.jsonl"
            if not path.is_file():
                write_rows(shuffled(options.data_dir / path.name, 0)[:most], path)
    failed = in_processes(Part(wanted, train_one, is_trained), options)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; call again to try them once more")


def wanted(options: argparse.Namespace) -> list[Run]:
    """The tasks of a method beside each other: some wait for the processor, others for the GPU."""
    runs = product(options.seeds, options.methods, options.tasks)
    return [Run(options.model, task, method, seed) for seed, method, task in runs]


def train_one(run: Run, options: argparse.Namespace) -> str:
    """Train one run and drop what is not kept; returns its outcome in words."""
    said = train_with(
        run,
        options,
        data_dir=options.folder / "data" if run.task in CUT else options.data_dir,
        epochs=options.epochs or MODELS[run.model].epochs,
        learning_rate=MODELS[run.model].rate(run.task, run.method),
        **METHODS[run.method][1],
    )
    folder = run.folder(options)
    if run.method in WITHOUT_FACTORS:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    else:
        thin(folder, every_epoch=(run.task, run.method) in EVERY_EPOCH)
    return said


def tables(options: argparse.Namespace) -> None:
    """Write runs.csv of the runs, if there are any, and of runs.csv the other tables and the figure."""
    import pandas as pd

    from msplora_analysis.show.drawing.plot import Plot

    out = options.out if options.model == "minilm" else options.out / options.model
    path = out / "runs.csv"
    if rows := [row_of(file) for file in sorted(options.folder.glob(f"runs/{options.model}/*/*/*/run.json"))]:
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row for row in rows if row]).to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    runs = pd.read_csv(path)
    is_front = options.model == "minilm"  # elsewhere few methods ran
    Plot("table1", means(runs), draw_front).write(out, options.formats if is_front else [])
    Plot("differences", differences(runs)).write(out, [])


def row_of(file: Path) -> dict[str, Any]:
    """A run, from its record; nothing, if it was not ended."""
    record = json.loads(file.read_text(encoding="utf-8"))
    task, method, _ = file.parent.parts[-3:]
    settings, results = record["settings"], record.get("results")
    if not results:
        return {}
    rows = {f"{name}_rows": of["rows"] for name, of in record["data"].items()}
    return (
        {"task": task, "method": method, "seed": settings["seed"], "learning_rate": settings["learning_rate"]}
        | {"parameters": record["parameters"]["adapter"], "metric": record["metric"]["name"]}
        | {"before": results[0]["metric"], "last": results[-1]["metric"], "loss": results[-1]["validation_loss"]}
        | rows
        | {"epochs": settings["epochs"], "device": record["device"]}
        | {library: record["versions"][library] for library in ("torch", "transformers", "peft")}
    )


def groups_of(runs: pd.DataFrame) -> dict[str, Sequence[str]]:
    """Each task, and averages."""
    return paired.groups_of([task for task in TASKS if task in set(runs["task"])], without="stsb")


def means(runs: pd.DataFrame) -> pd.DataFrame:
    """Of each method and task the mean over seeds, with its 95 % interval by t; averages give tasks equal weight.

    Only methods with three seeds of every task.
    """
    import pandas as pd

    from msplora_analysis.ask.comparison.uncertainty import estimate, sample

    rows = []
    groups = groups_of(runs)
    for method, name in NAMES.items():
        own = runs[runs["method"] == method]
        if own.groupby("task")["seed"].count().reindex(groups["average"]).fillna(0).min() < 3:
            continue
        for task, tasks in groups.items():
            of = own[own["task"].isin(tasks)]
            found = estimate(sample(of[["last"]].to_numpy(), of["task"].tolist()))
            low, high = found.interval(0.95)
            row = {"method": method, "name": name, "parameters": int(own["parameters"].iloc[0]), "task": task}
            seeds = of.groupby("task")["seed"].count()
            rows.append(row | {"seeds": seeds.min(), "mean": found.mean[0], "low": low[0], "high": high[0]})
    return pd.DataFrame(rows).round(5)


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """MSPLoRA minus each other method, paired by task and seed, of the seeds that all methods have.

    ``p`` of the averages is corrected for all methods (exact or drawn sign flips, see docs/statistics.md).
    """
    table = runs.pivot(index=["task", "seed"], columns="method", values="last")
    table = table[[name for name in NAMES if name in means(runs)["method"].unique()]].dropna()
    return paired.estimates(table.drop(columns=OURS).rsub(table[OURS], axis=0), groups_of(runs))


def draw_front(table: pd.DataFrame, style: str | None) -> Figure:
    """The averages over tasks against the parameters of the adapter; full fine-tuning, which has more, as a line."""
    from msplora_analysis.show.drawing.colours import PALETTE
    from msplora_analysis.show.drawing.figure import Figure
    from msplora_analysis.show.drawing.style import styled

    @styled
    def draw(table: pd.DataFrame, style: Any) -> Figure:
        figure = Figure(figsize=(style.widest, 2.8), layout="constrained")
        axes = figure.subplots(1, 2)
        for ax, group in zip(axes, ("average", WITHOUT), strict=True):
            own = table[table["task"] == group].reset_index(drop=True)
            for i, row in own.iterrows():
                look = {"color": PALETTE[1] if row["method"] == OURS else PALETTE[0], "label": row["name"]}
                if row["method"] == "fft":
                    ax.axhline(row["mean"], color="0.5", linestyle="--", linewidth=1, label=row["name"])
                    continue
                x = row["parameters"] * (0.94 + 0.03 * (i % 5))  # three methods have as many
                ax.plot([x, x], [row["low"], row["high"]], color=look["color"], linewidth=0.8)
                ax.plot(x, row["mean"], "os^DvP*X<>"[i], ms=5, **look)
            ax.set(xscale="log", xlim=(2e4, 2e5), xlabel="parameters beside the head")
            ax.set_xticks([25_000, 50_000, 100_000, 200_000], ["25k", "50k", "100k", "200k"])
            ax.set_xticks([], minor=True)
            ax.set_title("six tasks" if group == "average" else group)
        axes[0].set_ylabel("mean score")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
        return figure

    return draw(table, style)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    training = parts.add_parser("train")
    training.add_argument("--folder", type=Path, default=Path("runs/table1"), help="default: runs/table1")
    training.add_argument("--model", choices=MODELS, default="minilm", help="default: minilm")
    training_options(training, seeds=SEEDS, tasks=TASKS)
    training.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    training.add_argument("--epochs", type=int, help="default: 10 for minilm, 3 for smollm2")
    drawing = parts.add_parser("tables")
    drawing.add_argument("--folder", type=Path, default=Path("runs/table1"), help="default: runs/table1")
    drawing.add_argument("--model", choices=MODELS, default="minilm", help="default: minilm")
    drawing.add_argument("--out", type=Path, default=Path("figures/table1"), help="default: figures/table1")
    drawing.add_argument("--formats", nargs="+", choices=("png", "pdf", "svg"), default=["png", "pdf"])
    options = parser.parse_args()
    options.models = [options.model]  # as study/calibration.py has it
    return options


if __name__ == "__main__":
    call({"train": train, "tables": tables}, _options())
