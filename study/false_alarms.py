"""How often `msplora-analyze diagnose` speaks of healthy runs, and how often it sees a planted fault.

    python study/false_alarms.py FOLDER... --out figures/findings

Every run below the folders is diagnosed alone. It counts for a kind of finding only if the check could speak of it:
`norm-jump` needs a checkpoint between the first and the last, `scales-coupled` more than one scale. *Healthy* means
that training ended and that no fault is known. Some of these runs learned little, as `metric` in runs.csv shows.
Bounds are exact (Clopper and Pearson 1934), one-sided, at 95 %. They take runs as independent; seeds of one task are
not quite.

Each fault is planted into a copy of each LoRA run, in a module drawn at random. The script writes

    runs.csv            a row for each run: how many places each kind of finding names
    false_alarms.csv    a row for each kind: in how many of how many runs it was seen, and the bound
    detected.csv        a row for each fault: in how many of how many runs it was found at its place, and the bound
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from scipy.stats import binomtest

import msplora_analysis as ma
from msplora_analysis.ask.findings import KINDS, spectrum

WEIGHTS = "adapter_model.safetensors"
PLANTED_IN = ("lora", "dylora", "pissa")
NEEDS_RANK = ("dominant-direction", "rank-oversized", "rank-unused", "rank-saturated")
NEEDS_BASE = ("large-relative-update", "intruder-dimensions")
CHECKPOINTS = {"norm-jump": 3, "spectra-converged": 4, "dominance-growing": 11}  # least, with that of step 0
Tensors = dict[str, Any]


def diagnosed(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each run that holds adapters."""
    for record in sorted(folder.rglob("run.json")):
        run = record.parent
        about = json.loads(record.read_text(encoding="utf-8"))
        last = about["results"][-1]
        try:
            counts = ma.diagnose(run)["id"].value_counts()
        except ma.AnalysisError:
            continue  # of methods without factors only the record was kept
        yield {
            "run": str(run.relative_to(folder)),
            "model": Path(about["model"]["name"]).name,
            **{name: about["settings"][name] for name in ("task", "method", "rank", "seed")},
            "checkpoints": len(list(run.glob(f"*/{WEIGHTS}"))),
            "metric": last["metric"],
            **{kind: int(counts.get(kind, 0)) for kind in KINDS},
            "path": run,
        }


def false_alarms(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for kind, about in KINDS.items():
        if kind in NEEDS_BASE:
            continue
        able = runs[runs["checkpoints"] >= CHECKPOINTS.get(kind, 1)]
        if kind == "scales-coupled":
            able = able[able["method"] == "msplora"]
        if kind in NEEDS_RANK:
            able = able[~(able["rank"] < spectrum.RANK)]
        yield {"id": kind, "severity": about.severity, **bounded("seen", int((able[kind] > 0).sum()), len(able))}


def bounded(name: str, count: int, runs: int) -> dict[str, Any]:
    """A count of runs, with the one-sided bounds of its rate."""
    if not runs:
        return {name: 0, "runs": 0, "at_least": None, "at_most": None}
    low, high = (
        getattr(binomtest(count, runs, alternative=side).proportion_ci(0.95, "exact"), end)
        for side, end in (("greater", "low"), ("less", "high"))
    )
    return {name: count, "runs": runs, "at_least": round(low, 4), "at_most": round(high, 4)}


# Faults


def zeroed(tensors: Tensors, a: str, b: str) -> None:
    tensors[b] = np.zeros_like(tensors[b])


def not_finite(tensors: Tensors, a: str, b: str) -> None:
    tensors[b] = tensors[b].copy()
    tensors[b].flat[0] = np.nan


def scaled(factor: float) -> Callable[[Tensors, str, str], None]:
    def plant(tensors: Tensors, a: str, b: str) -> None:
        tensors[b] = tensors[b] * factor

    return plant


def all_scaled(factor: float) -> Callable[[Tensors, str, str], None]:
    def plant(tensors: Tensors, a: str, b: str) -> None:
        for name in tensors:
            if ".lora_B" in name:
                tensors[name] = tensors[name] * factor

    return plant


def copied(tensors: Tensors, a: str, b: str) -> None:
    """The layer of this module takes the update of another one."""
    kind = b.split(".layer.")[-1].partition(".")[2] if ".layer." in b else b.split(".layers.")[-1].partition(".")[2]
    other = next(name for name in sorted(tensors) if name.endswith(kind) and name != b)
    tensors[b], tensors[a] = tensors[other], tensors[other.replace("lora_B", "lora_A")]


FAULTS: dict[str, tuple[str, Callable[[Tensors, str, str], None]]] = {
    "B of one module is 0": ("no-update", zeroed),
    "one value is NaN": ("non-finite", not_finite),
    "one module × 4": ("norm-outlier", scaled(4)),
    "one module × 10": ("norm-outlier", scaled(10)),
    "last checkpoint: one module × 10": ("norm-jump", scaled(10)),
    "all modules × 10": ("large-update", all_scaled(10)),
    "all modules × 30": ("large-update", all_scaled(30)),
    "one layer copied to another": ("identical-update", copied),
}


def detected(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    for fault, (kind, plant) in FAULTS.items():
        able = runs[runs["method"].isin(PLANTED_IN) & (runs["checkpoints"] >= CHECKPOINTS.get(kind, 1))]
        found = [is_found(run, kind, plant, rng) for run in able["path"]]
        yield {"fault": fault, "id": kind, **bounded("found", sum(found), len(found))}


def is_found(run: Path, kind: str, plant: Callable[[Tensors, str, str], None], rng: np.random.Generator) -> bool:
    """Whether the fault is found in its module (or in either of the two layers that are alike)."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / run.name
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("model.safetensors", "*.pt"))
        file = max(copy.glob(f"*/{WEIGHTS}"), key=lambda path: int(path.parent.name.rpartition("-")[2]))
        tensors = load_file(file)
        b = str(rng.choice(sorted(name for name in tensors if ".lora_B" in name)))
        plant(tensors, b.replace("lora_B", "lora_A"), b)
        save_file(tensors, file)
        findings = ma.diagnose(copy, cache=False)
        named = findings.loc[findings["id"] == kind, "name"].dropna()
        return bool(len(named)) if kind in ("large-update", "identical-update") else any(name in b for name in named)


def main(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = pd.DataFrame(row for folder in options.folders for row in diagnosed(folder))
    runs.drop(columns="path").to_csv(options.out / "runs.csv", index=False, float_format="%.6g", lineterminator="\n")
    for name, rows in (("false_alarms", false_alarms), ("detected", detected)):
        table = pd.DataFrame(rows(runs))
        table.to_csv(options.out / f"{name}.csv", index=False, lineterminator="\n")
        print(table.to_string(index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of runs of msplora-train")
    parser.add_argument("--out", type=Path, default=Path("figures/findings"), help="folder of the tables")
    main(parser.parse_args())
