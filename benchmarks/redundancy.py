"""All pairs of 80 layers × 7 modules at the width of LLaMA-2-7B, r 16: the toolkit against scipy, pair by pair.

    python benchmarks/redundancy.py [--data .bench/adapters] [--rounds 3] [--pairs 12]

Ours: ``load_redundancy`` from the file to the table (spectra, divergences, directions, overlaps of both sides,
cosines), in one process and in one for each core. scipy: ``scipy.linalg.subspace_angles`` of the input and of the
output factors of a pair, which gives the overlaps of whole subspaces alone; measured on a few pairs of each shape, and
extrapolated to all of them. Prints JSON; ``agreement`` is the largest difference of an overlap between the two.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command msplora-analyze does

import argparse
import json
import resource
import statistics
import time
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import adapters
import numpy as np
from adapters import CASES, Case

CASE = replace(
    CASES["L float32"], name="pairs", title="LLaMA-2-7B wide, 80 layers, all seven linears r 16", layers=80, rank=16
)


def ours(folder: Path, rounds: int, workers: int) -> tuple[list[float], Any]:
    """Seconds of each round, and the table of the last."""
    from msplora_analysis import load_redundancy

    seconds = []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        pairs = load_redundancy(folder, workers=workers, details=True).pairs
        seconds.append(time.perf_counter() - start)
    return seconds[1:], pairs


def scipy_pairs(case: Case, file: Path, count: int, pairs: Any) -> tuple[float, float]:
    """Seconds for all pairs, extrapolated from ``count`` of each module; largest difference to our overlaps."""
    from scipy.linalg import subspace_angles

    layers = int(np.ceil((1 + np.sqrt(1 + 8 * count)) / 2))  # as few as have so many pairs
    held = {
        name: (a, b)
        for name, a, b in adapters.factors(file)
        if int(name.removeprefix(f"{case.stack}.").partition(".")[0]) < layers
    }
    known = {(row.name_i, row.name_j): (row.overlap_in, row.overlap_out) for row in pairs.itertuples()}
    total, worst = 0.0, 0.0
    for linear in case.linears:
        names = [f"{case.stack}.{layer}.{linear.path}" for layer in range(layers)]
        seconds = []
        for i, j in islice(combinations(names, 2), count):
            start = time.perf_counter()
            angles = subspace_angles(held[i][0].T, held[j][0].T), subspace_angles(held[i][1], held[j][1])
            seconds.append(time.perf_counter() - start)
            overlaps = [(np.cos(side) ** 2).mean() for side in angles]
            worst = max(worst, *np.abs(np.subtract(overlaps, known[i, j])))
        total += statistics.median(seconds) * case.layers * (case.layers - 1) / 2
    return total, worst


def measure(data: Path, rounds: int, count: int, cores: int) -> dict[str, Any]:
    """Medians of all, in seconds."""
    folder = adapters.make(CASE, data)
    found: dict[str, Any] = {"case": CASE.title, "rounds": rounds, "load_before": os.getloadavg()[0]}
    seconds, pairs = ours(folder, rounds, workers=1)
    found["pairs"] = len(pairs)
    found["one_process_s"] = statistics.median(seconds)
    found["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds, _ = ours(folder, rounds, workers=cores)
    found[f"{cores}_processes_s"] = statistics.median(seconds)
    found["scipy_extrapolated_s"], found["agreement"] = scipy_pairs(CASE, adapters.files(folder)[0], count, pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the comparison of all pairs of layers.")
    parser.add_argument("--data", type=Path, default=Path(".bench/adapters"), help="where the adapters are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=12, help="pairs of each module that scipy compares")
    parser.add_argument("--cores", type=int, default=2)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.data, arguments.rounds, arguments.pairs, arguments.cores), indent=2))


if __name__ == "__main__":
    main()
