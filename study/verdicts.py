"""How often verdicts of `msplora-analyze compare` err, by simulation: the table and the figure of docs/statistics.md.

    python study/verdicts.py --out figures/statistics        # or: make statistics
    python study/verdicts.py --samples 40 --designs 3x3      # a look

Two kinds of error: an interval that misses the truth (`coverage` is how often it does not), and a comparison of equal
methods that decides anything (`family`: any of its rows). Differences of runs are drawn

    normal      from a normal distribution
    skewed      from an exponential one, less its mean: far from symmetric, which is what the test of signs assumes
    study       from what the study's own pairs of runs leave beside the means of their tasks, whole rows at once

for six rows that hang together (correlation 0.5; eight as they are in the study). `swapped` is the whole procedure on
the study's own tables: methods whose labels were swapped in random pairs of runs, so that nothing is there to find.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from msplora_analysis.ask.comparison import compare as comparison
from msplora_analysis.ask.comparison import uncertainty
from msplora_analysis.ask.comparison.compare import DIFFERENCES, Side, compare
from msplora_analysis.ask.comparison.sides import side_of
from msplora_analysis.ask.comparison.uncertainty import LEVEL, estimate, least_p, p_values, sample
from msplora_analysis.tables.files import read_spectra
from msplora_analysis.tables.gather import stored_pairs

ROOT = Path(__file__).resolve().parents[1]
DESIGNS = [(tasks, seeds) for tasks in (1, 2, 3, 6, 9) for seeds in (3, 5, 10)]
STUDY = [("MSPLoRA 8/8/8", "LoRA r=8"), ("MSPLoRA 8/4/2", "LoRA r=2")]  # of equal numbers of values
ROWS = 6

Draw = Callable[[np.random.Generator, int], Any]
"""Differences (n, rows) of mean 0."""


def normal(rng: np.random.Generator, n: int) -> Any:
    return rng.normal(size=(n, 1)) + rng.normal(size=(n, ROWS))


def skewed(rng: np.random.Generator, n: int) -> Any:
    return rng.exponential(size=(n, 1)) + rng.exponential(size=(n, ROWS)) - 2


def study(rng: np.random.Generator, n: int) -> Any:
    """Residuals of one of the comparisons, each sign as likely: equal methods, whose pairs can be swapped."""
    pool = residuals()[rng.integers(len(residuals()))]
    return pool[rng.integers(len(pool), size=n)] * rng.choice([1, -1], size=(n, 1))


SHAPES: dict[str, Draw] = {"normal": normal, "skewed": skewed, "study": study}


@cache
def sides(model: str, a: str, b: str) -> tuple[Side, Side]:
    """Two methods of the study, at the last epoch."""
    table = ROOT / "figures" / "study" / model / "spectra.parquet"
    spectra = read_spectra(table)
    last = spectra[(spectra["epoch"] == spectra["epoch"].max()) & (spectra["scale"] != "total")]
    pairs = stored_pairs(table, "pairs")
    return side_of(last, a, model, pairs=pairs), side_of(last, b, model, pairs=pairs)


@cache
def residuals() -> list[Any]:
    """For each comparison, differences of pairs of runs (n, rows) less the mean of their task, of their full spread."""
    found = []
    for model, (a, b) in product(("minilm", "smollm2"), STUDY):
        ours, theirs, _ = comparison._layers(*sides(model, a, b), None, None)
        ours, theirs, paired = comparison._matched(ours, theirs)
        measured = [
            [comparison._measured(side, measure, "spectra", None) for side in (ours, theirs)]
            for measure in ("kl", "js", "overlap_in", "overlap_out")
        ]
        of, _ = comparison._sample(ours, theirs, measured, paired, "runs")
        parts = [of.values[of.strata == task] for task in np.unique(of.strata)]
        found.append(np.concatenate([(x - x.mean(0)) * np.sqrt(len(x) / (len(x) - 1)) for x in parts]))
    return found


def simulated(
    shape: str, tasks: int, seeds: int, paired: bool, samples: int, rng: np.random.Generator
) -> dict[str, Any]:
    """How often intervals of 95 % hold the truth, and how often equal methods are told apart."""
    names = np.repeat(np.arange(tasks), seeds)
    held, decided, widths = [], [], []
    for _ in range(samples):
        effects = rng.normal(size=(tasks, 1)) * 2  # tasks differ: that must not widen an interval about them
        if paired:
            values = SHAPES[shape](rng, len(names))
            of = sample(values, list(names))
            about = of._replace(values=values + effects[names])
        else:
            values = SHAPES[shape](rng, 2 * len(names))
            labels = np.repeat([1, -1], len(names))
            of = sample(values, [*names, *names], labels)
            about = of._replace(values=values + np.where(labels[:, None] > 0, effects[of.strata % tasks], 0))
        low, high = estimate(about).interval(0.95)
        held.append((low <= effects.mean()) & (effects.mean() <= high))
        widths.append(high - low)
        able = least_p(of) / DIFFERENCES <= LEVEL
        decided.append(able and bool((p_values(of) / DIFFERENCES <= LEVEL).any()))
    return {
        "data": shape, "tasks": tasks, "seeds": seeds, "paired": paired, "samples": samples,
        "coverage": float(np.mean(held)), "family": float(np.mean(decided)),
        "can_decide": least_p(of) / DIFFERENCES <= LEVEL,
    }  # fmt: skip


def swapped(model: str, a: str, b: str, seeds: int, samples: int, rng: np.random.Generator) -> dict[str, Any]:
    """The whole of `compare` on the study's tables, where each pair of runs swaps its labels or does not."""
    both = sides(model, a, b)
    spectra = pd.concat([side.spectra[side.spectra["scale"] == "layer"] for side in both])
    pairs = both[0].pairs
    assert pairs is not None
    known = [{(unit.task, unit.seed): unit.run for unit in side.units or ()} for side in both]
    partner = {run: known[1][key] for key, run in known[0].items() if key[1] is not None and key[1] <= seeds}
    decided = []
    for _ in range(samples):
        names: dict[str, str] = {}
        for run, other in partner.items():
            if rng.random() < 0.5:
                names |= {run: other, other: run}
        mixed = [table.assign(run=table["run"].replace(names)) for table in (spectra, pairs)]
        new = [
            Side(side.label, mixed[0][mixed[0]["run"].isin(runs)], mixed[1], side.units)
            for side, runs in zip(both, (list(partner.keys()), list(partner.values())), strict=True)
        ]
        table = compare(*new)
        decided.append(table.loc[table["question"] == "difference", "decided"].any())
    return {
        "data": f"swapped {model}, {a} and {b}", "tasks": 3, "seeds": seeds, "paired": True, "samples": samples,
        "coverage": float("nan"), "family": float(np.mean(decided)), "can_decide": True,
    }  # fmt: skip


def rows(samples: int, designs: list[tuple[int, int]], seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    for tasks, seeds in designs:
        for shape in SHAPES:
            yield simulated(shape, tasks, seeds, True, samples, rng)
        yield simulated("normal", tasks, seeds, False, samples, rng)
    if (3, 3) in designs:
        for model in ("minilm", "smollm2"):
            for a, b in STUDY:
                yield swapped(model, a, b, 3, max(1, samples // 4), rng)


def draw(table: pd.DataFrame, out: Path) -> None:
    """Coverage and family error over the number of seeds, a line for each number of tasks."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(7, 3.8), sharex=True, sharey="row", layout="constrained")
    for column, shape in enumerate(SHAPES):
        for tasks, line in table[(table["data"] == shape) & table["paired"]].groupby("tasks"):
            for ax, name in zip(axes[:, column], ("coverage", "family"), strict=True):
                shown = line if name == "coverage" else line[line["can_decide"]]
                ax.plot(shown["seeds"], shown[name], "o-", markersize=3, linewidth=1, label=f"{tasks}")
        axes[0, column].set_title(shape, fontsize=9)
        axes[1, column].set_xlabel("pairs of runs a task")
    for ax, level, label in zip(
        axes[:, 0], (0.95, 0.05), ("interval holds the truth", "equal methods told apart"), strict=True
    ):
        ax.set_ylabel(label, fontsize=8)
        for beside in axes[0] if level > 0.5 else axes[1]:
            beside.axhline(level, color="0.6", linewidth=0.6)
    axes[0, 0].set_ylim(0.7, 1)
    axes[1, 0].set_ylim(0, 0.15)
    axes[0, 2].legend(title="tasks", fontsize=7, title_fontsize=7, ncols=2)
    figure.savefig(out / "verdicts.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "statistics")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument(
        "--draws", type=int, default=999, help="of random relabelling above 15 pairs, where compare has 9,999"
    )
    parser.add_argument(
        "--designs", nargs="+", metavar="TxS", help="such as 3x5: tasks and seeds (default: 1x3 to 9x10)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    uncertainty.DRAWS = options.draws
    asked = [one.partition("x") for one in options.designs or ()]
    designs = [(int(tasks), int(seeds)) for tasks, _, seeds in asked] or DESIGNS
    options.out.mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows(options.samples, designs, options.seed):
        print(row, flush=True)
        found.append(row)
    with (options.out / "verdicts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    draw(pd.DataFrame(found), options.out)


if __name__ == "__main__":
    main()
