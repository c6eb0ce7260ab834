"""Table 2 of the paper in small: SmolLM2-135M-Instruct tuned on a part of Alpaca.

    python study/table2.py train --data-dir data --jobs 4       # two GPUs: --seeds 11, and --seeds 12
    python study/table2.py tables

    lora-64             LoRA r 64, on q_proj and v_proj
    lora-21             LoRA of MSPLoRA's parameters (30 layers: 21 · 30 = 630, and 64 + 3 · 32 + 30 · 16 = 640), with
                        the alpha / rank of r 64
    msplora-64-32-16    MSPLoRA
    qlora-64            LoRA r 64 on the model in 4 bits (needs bitsandbytes and a GPU)

All else is the recipe of msplora-train's task alpaca, which is the released script's: 3 epochs, 3e-4, batch 128, alpha
16. Trained is on at most 6,000 rows (a shuffle with the seed 0 chooses them); the score is the perplexity of the
responses of 600 others that a prompt's hash holds out. After training, moments of 256 training examples are
recorded, and the spectra of the updates taken, plain and weighted by the task.

No benchmark of the paper's Table 2 is here. Its numbers were measured with instruct-eval, which generates answers and
compares their beginning; lm-evaluation-harness's tasks of the same names measure something else.

Files in --folder: alpaca.csv, a row a training, appended as it ends; kept/: its spectra. `tables` writes runs.csv and
spectra.csv, and of them table2.csv and table2.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from calibration import base_model
from learning_rates import shuffled, write_rows
from searched import Row, Run, all_runs, call, train_all, train_run, training_options

TASK = "alpaca"
ROWS = 6600  # of which a tenth is held out
EXAMPLES = 256
RATES = (3e-4,)
CONFIGURATIONS: dict[str, dict[str, Any]] = {  # options of the method
    "lora-64": {"method": "lora", "rank": 64},
    "msplora-64-32-16": {"method": "msplora", "ranks": {"global": 64, "mid": 32, "layer": 16}},
    "lora-21": {"method": "lora", "rank": 21, "lora_alpha": 16 * 21 / 64},
    "qlora-64": {"method": "qlora", "rank": 64},
}
NAMES = {
    "lora-64": "LoRA r=64",
    "lora-21": "LoRA r=21",
    "msplora-64-32-16": "MSPLoRA 64/32/16",
    "qlora-64": "QLoRA r=64",
}


def train(options: argparse.Namespace) -> None:
    """Train what is not trained yet."""
    options.model = str(base_model("smollm2", options))
    path = options.folder / "data" / f"{TASK}_train.jsonl"
    write_rows(shuffled(options.data_dir / path.name, 0)[: options.rows], path)
    train_all(options, partial(wanted, options), train_one)


def wanted(options: argparse.Namespace, task: str, rows: dict[Run, Row]) -> Iterator[Run]:
    """A seed of all after the other."""
    for seed in options.seeds:
        for rate in options.rates:
            yield from (Run("test", configuration, rate, seed) for configuration in options.configurations)


def train_one(task: str, run: Run, options: argparse.Namespace) -> Row:
    """Train one run, take its spectra; returns its row."""
    from msplora_core.methods import get_method

    given = dict(CONFIGURATIONS[run.configuration])
    method = get_method(given.pop("method")).from_options(given)
    path = options.folder / "kept" / f"{run.configuration}_{run.learning_rate:g}_seed-{run.seed}.csv.gz"
    return train_run(
        task,
        run,
        options,
        partial(look, path),
        method=method,
        data_dir=options.folder / "data",
        micro_batch_size=options.micro_batch_size,
    )


def look(path: Path, folder: Path) -> Row:
    """Record moments of the last adapter and keep its spectra; returns medians over its matrices."""
    import msplora_analysis as ma
    from msplora_core.measure.loading import load_subject
    from msplora_core.measure.recording import record_moments

    subject = load_subject(folder)
    record_moments(subject.model, subject.batches("train", EXAMPLES)).save(subject.adapter / "moments.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    ma.load_spectra(subject.adapter, cache=False).to_csv(path, index=False, float_format="%.5g")
    metrics = ma.load_metrics(subject.adapter, cache=False)
    whole = metrics[metrics["scale"] == ("total" if "total" in set(metrics["scale"]) else "layer")]
    medians = whole[["rank", "frobenius", "effective_rank", "m_eff_1", "task_effective_rank"]].median()
    return {name: f"{value:.5g}" for name, value in medians.items()}


def tables(options: argparse.Namespace) -> None:
    """Write runs.csv of the rows, if there are any, and of runs.csv the table and its picture."""
    import pandas as pd

    runs, spectra = all_runs(options, [TASK]), options.out / "spectra.csv"
    if kept := [mean_spectrum(file) for file in sorted((options.folder / "kept").glob("*.csv.gz"))]:
        pd.concat(kept).to_csv(spectra, index=False, float_format="%.5g", lineterminator="\n")
    columns = ["parameters", "first", "last", "loss", "frobenius", "effective_rank", "m_eff_1", "task_effective_rank"]
    by = runs.groupby(["configuration", "learning_rate"], sort=False)
    table = by[columns].mean().assign(seeds=by.size(), lowest=by["last"].min(), highest=by["last"].max())
    table.reset_index().to_csv(options.out / "table2.csv", index=False, float_format="%.5g", lineterminator="\n")
    print(table.to_string())
    draw(pd.read_csv(spectra), options.out / "table2.png")


def mean_spectrum(file: Path) -> Any:
    """Of a run, each singular value over the largest of its matrix, the mean over matrices."""
    import pandas as pd

    table = pd.read_csv(file)
    table = table[table["scale"] == ("total" if "total" in set(table["scale"]) else "layer")]
    for name in ("sigma", "task_sigma"):
        table[name] /= table.groupby(["group", "module"])[name].transform("max")
    configuration = file.name.partition("_")[0]
    return table.groupby("k")[["sigma", "task_sigma"]].mean().reset_index().assign(configuration=configuration)


def draw(table: Any, path: Path) -> None:
    """Both spectra of each configuration, over the number of the value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = dict(zip(NAMES, ("#0072b2", "#56b4e9", "#d55e00", "0.5"), strict=True))
    for ax, column, title in zip(
        axes, ("sigma", "task_sigma"), ("of the updates", "weighted by the task"), strict=True
    ):
        for name, own in table.groupby("configuration", sort=False):
            mean = own.groupby("k")[column].mean()
            ax.plot(mean.index, mean, color=colours[name], label=NAMES[name], linewidth=1.2)
        ax.set(yscale="log", ylim=(1e-3, 1.1), xlabel="number of the singular value")
        ax.set_title(f"spectra {title}", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("part of the largest, mean")
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/table2"), help="where the rows go (runs/table2)")
    parts = parser.add_subparsers(dest="part", required=True)
    training = parts.add_parser("train")
    training_options(training, seeds=[11, 12])
    training.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    training.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="default: 3e-4")
    training.add_argument("--rows", type=int, default=ROWS, help=f"with those held out (default: {ROWS})")
    training.add_argument("--micro-batch-size", type=int, default=32, help="default: 32")
    training.add_argument("--epochs", type=int, default=3)
    training.set_defaults(tasks=[TASK])
    drawing = parts.add_parser("tables")
    drawing.add_argument("--out", type=Path, default=Path("figures/table2"), help="default: figures/table2")
    return parser.parse_args()


if __name__ == "__main__":
    call({"train": train, "tables": tables}, _options())
