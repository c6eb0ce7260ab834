"""How long finding adapters takes, beside a bare walk of the same folders, in one process.

    python benchmarks/finding.py --adapters 10000

CPU time of ``discover`` over that of ``os.walk``. Names decide what is an adapter, of which run and step; the two small
JSON files beside each (its configuration, and the state that tells its epoch) are read when they are asked for. What
that costs is told too: ``discover`` and then the epoch and the configuration of every adapter. The files are in the
memory of the system by then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from msplora_analysis.adapters.discovery import discover


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, arguments.adapters)
        ratios = []
        for _ in range(arguments.repeat):
            bare, found, read = (seconds(call, root) for call in (walk, discover, discover_and_read))
            ratios.append((found / bare, read / bare))
            print(f"walk {bare:.2f} s; discover {found / bare:.1f} x; with both files of each read {read / bare:.1f} x")
        found, read = (statistics.median(column) for column in zip(*ratios, strict=True))
        print(f"medians: discover {found:.2f} x; with both files of each read {read:.2f} x")


def make(root: Path, count: int) -> None:
    """Runs of a hundred checkpoints, as Trainer leaves them."""
    factors = {f"base_model.model.q.lora_{factor}.weight": np.zeros((2, 2), np.float32) for factor in "AB"}
    weights = save(factors)
    for i in range(count):
        folder = root / f"run{i // 100}" / f"checkpoint-{i % 100 + 1}"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
        state = {"epoch": 1.0, "global_step": i % 100 + 1, "log_history": []}
        (folder / "trainer_state.json").write_text(json.dumps(state))


def seconds(call: Callable[[Path], object], root: Path) -> float:
    begin = time.process_time()
    call(root)
    return time.process_time() - begin


def walk(root: Path) -> None:
    for _ in os.walk(root):
        pass


def discover_and_read(root: Path) -> None:
    for adapter in discover(root):
        _ = adapter.epoch, adapter.config


if __name__ == "__main__":
    main()
