"""How long finding adapters takes, beside a bare walk of the same folders, in one process.

    python benchmarks/finding.py --adapters 10000

CPU time of ``discover`` over that of ``os.walk``, and of the least that any finder does which reads the two small JSON
files of each adapter: a walk that opens and parses them. The files are in the memory of the system by then.
"""

from __future__ import annotations

import argparse
import json
import os
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
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, arguments.adapters)
        for _ in range(arguments.repeat):
            bare, least, found = (seconds(call, root) for call in (walk, walk_and_read, discover))
            print(f"walk {bare:.2f} s; with both files read {least / bare:.1f} x; discover {found / bare:.1f} x")


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


def walk_and_read(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            if name.endswith(".json"):
                with open(f"{folder}/{name}", "rb") as file:
                    json.loads(file.read())


if __name__ == "__main__":
    main()
