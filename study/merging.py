"""What merging costs the tasks: every method, pairs and triples of four tasks (docs/merge.md).

    python study/merging.py --calibration FOLDER --data-dir glue
    python study/merging.py                               # redraws the published ones from tasks.csv

Of the MiniLM runs of study/calibration.py: LoRA rank 8, adapters of one seed together. Each task is evaluated with its
own head and the merged update, on its first EXAMPLES validation examples. Methods that add have a weight of 1 / n each,
those that take a mean have 1. tasks.csv has every metric; kept.csv the share of what the adapters give that is left.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from relations import TASKS, TITLES, adapters, added, factors_of
from scipy.stats import t

from msplora_analysis.show.drawing import text
from msplora_analysis.show.drawing.colours import PALETTE
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style

ADD, MEAN = ("cat", "svd", "linear", "dare", "tsv", "iso"), ("ties", "knots", "lego")
METHODS = (*ADD, *MEAN)
METRICS = {"cola": "Matthews", "stsb": "Pearson", "mrpc": "accuracy", "rte": "accuracy"}
EXAMPLES = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--calibration", type=Path, help="folder of study/calibration.py; without it, tasks.csv is read"
    )
    parser.add_argument("--data-dir", type=Path, help="folder with {task}_validation.jsonl[.gz]")
    parser.add_argument("--out", type=Path, default=Path("figures/merging"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 3], help="of the sets that are merged")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the adapters")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.calibration:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = pd.DataFrame({"seed": seed} | row for seed in options.seeds for row in _rows(options, seed))
        table.round(4).to_csv(options.out / "tasks.csv", index=False)
    table = pd.read_csv(options.out / "tasks.csv")
    draw(table).savefig(options.out / "tasks.png", dpi=200)
    left = kept(table)
    left.round(3).to_csv(options.out / "kept.csv", index=False)
    print(left.round(2).to_string())


def kept(table: pd.DataFrame) -> pd.DataFrame:
    """The share of each adapter's gain that is left, by size and method, beside that of ``cat``.

    Means over sets and tasks, RTE left out, whose adapter gains too little. ``half``: of the 95 % t interval over
    seeds, of the difference to ``cat``.
    """
    alone = table[table["method"] == "alone"].set_index(["seed", "task"])["metric"]
    none = table[table["method"] == "none"].set_index(["seed", "task"])["metric"]
    merged = table[(table["n"] > 1) & (table["task"] != "rte")]
    share = merged.join(alone.rename("alone"), on=["seed", "task"]).join(none.rename("none"), on=["seed", "task"])
    share["share"] = (share["metric"] - share["none"]) / (share["alone"] - share["none"])
    by_seed = share.groupby(["n", "method", "seed"])["share"].mean().unstack()
    beyond = by_seed.sub(by_seed.xs("cat", level="method"), axis=0, level="n")
    lowest = share.groupby(["n", "method"])["share"].min()
    half = t.ppf(0.975, by_seed.shape[1] - 1) * beyond.std(axis=1) / by_seed.shape[1] ** 0.5
    found = pd.DataFrame({"share": by_seed.mean(axis=1), "lowest": lowest, "to_cat": beyond.mean(axis=1), "half": half})
    return found.reset_index().sort_values(["n", "share"], ascending=[True, False])


@styled
def draw(table: pd.DataFrame, style: Style) -> Figure:
    """The metric of each task after each merge, between those without the adapter and with it alone."""
    figure, seeds = Figure(figsize=(style.widest, 2.8), layout="constrained"), table["seed"].nunique()
    axes = figure.subplots(1, len(TASKS), sharey=True)
    merged = table[table["n"] > 1]
    sizes = sorted(set(merged["n"]))
    for ax, task in zip(axes, TASKS, strict=True):
        for method, line in (("none", ":"), ("alone", "-")):
            at = table[(table["task"] == task) & (table["method"] == method)]["metric"]
            ax.axvline(float(at.mean()), color="0.4", linewidth=0.8, linestyle=line)
        for n, colour, mark in zip(sizes, PALETTE, "os", strict=False):
            rows = merged[(merged["task"] == task) & (merged["n"] == n)]
            place = [METHODS.index(method) + 0.22 * (2 * sizes.index(n) - len(sizes) + 1) for method in rows["method"]]
            ax.plot(rows["metric"], place, linestyle="", marker=mark, markersize=2.5, color=colour)
        ax.set_title(TITLES[task])
        ax.set_xlabel(METRICS[task])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(METHODS)), METHODS)
    axes[0].invert_yaxis()
    shown = [
        Line2D([], [], linestyle="", marker=mark, markersize=4, color=colour)
        for _, colour, mark in zip(sizes, PALETTE, "os", strict=False)
    ]
    shown += [Line2D([], [], color="0.4", linewidth=0.8, linestyle=line) for line in ("-", ":")]
    names = [f"merged with {n - 1} other{'s' if n > 2 else ''}" for n in sizes]
    text.title(
        figure,
        "What merging leaves of each task",
        f"MiniLM, LoRA r = 8, {seeds} seeds, {EXAMPLES} examples or fewer",
    )
    text.legend_below(figure, shown, [*names, "its adapter alone", "no adapter"])
    text.fit(figure)
    return figure


def _rows(options: Any, seed: int) -> Iterator[dict[str, Any]]:
    import torch

    import msplora_analysis as ma
    from msplora_core.measure.loading import load_subject

    torch.set_num_threads(1)
    lora = adapters(options.calibration, ("lora-8",))
    own = {name.split("/")[0]: path for name, path in lora.items() if name.endswith(f"/seed-{seed}")}
    merged: dict[tuple[tuple[str, ...], str], Any] = {}
    sets = [chosen for n in options.sizes for chosen in combinations(TASKS, n)]
    with tempfile.TemporaryDirectory() as folder:
        for chosen in sets:
            for method in (*ADD, *MEAN):
                out = Path(folder) / "-".join((*chosen, method))
                share = 1 / len(chosen) if method in ADD else 1.0
                ma.merge([own[task] for task in chosen], out, method=method, weights=[share] * len(chosen))
                merged[chosen, method] = factors_of(out)
    for task, path in own.items():
        subject = load_subject(path, data_dir=options.data_dir, model=str(options.calibration / "models" / "minilm"))
        batches = subject.batches("validation", examples=EXAMPLES, batch_size=64, by_length=True)
        before = factors_of(path)
        yield {"n": 1, "tasks": task, "method": "alone", "task": task, "metric": evaluated(subject, batches, {})}
        without = {name: (a, -b) for name, (a, b) in before.items()}
        yield {"n": 0, "tasks": "", "method": "none", "task": task, "metric": evaluated(subject, batches, without)}
        for (chosen, method), update in merged.items():
            if task in chosen:
                change = {
                    name: (torch.cat([a, before[name][0]]), torch.cat([b, -before[name][1]], dim=1))
                    for name, (a, b) in update.items()
                }
                about = {"n": len(chosen), "tasks": "+".join(chosen), "method": method, "task": task}
                yield about | {"metric": evaluated(subject, batches, change)}
        print(f"seed {seed}, {task}", flush=True)


def evaluated(subject: Any, batches: Any, update: Any) -> float:
    """The task's metric with another update besides the adapter's own."""
    import torch

    from msplora_core.data.evaluation import metric_value

    with torch.no_grad(), added(subject.model, update):
        values = torch.cat([subject.model(**batch).logits for batch in batches]).float().numpy()
    labels = np.concatenate([batch["labels"].numpy() for batch in batches])
    found = metric_value(subject.task.metric, values, labels, np.ones((1, len(labels))))
    return float(np.asarray(found).ravel()[0])


if __name__ == "__main__":
    main()
