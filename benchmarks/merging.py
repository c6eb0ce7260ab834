"""Merging adapters of LLaMA-2-7B's size (r 64, seven linears) by SVD, beside what PEFT computes for it.

    python benchmarks/merging.py --adapters 2
    python benchmarks/merging.py --adapters 8 --peft ""
    python benchmarks/merging.py --adapters 2 --peft "" --layers 32      # files of the whole model, 320 MB each

PEFT's add_weighted_adapter(combination_type="svd") adds dense updates and decomposes each sum in float32
(torch.linalg.svd): its steps are timed here on one module, ours on the modules of a layer, of which the model has 32,
each in a fresh process. With --layers files of so many layers in float16 are written first, and `merge` is timed from
these to the file that it writes. Seconds are of the processor: other programs count less. Peak memory is that of a
process beyond its start.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from typing import Any

LAYER = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)} | {
    "gate": (11008, 4096),
    "up": (11008, 4096),
    "down": (4096, 11008),
}
RANK = 64


def _factors(adapters: int, rows: int, cols: int) -> Any:
    import numpy as np

    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal((RANK, cols), np.float32), rng.standard_normal((rows, RANK), np.float32))
        for _ in range(adapters)
    ]


def ours(adapters: int, shapes: Any) -> float:
    import numpy as np

    from msplora_analysis.compute.merging.protocol import Part, Settings
    from msplora_analysis.compute.merging.svd import merge

    seconds = 0.0
    for rows, cols in shapes:
        parts = [
            Part(a.astype(np.float64), b.astype(np.float64), 1.0, np.ones(RANK))
            for a, b in _factors(adapters, rows, cols)
        ]
        start = time.process_time()
        merge(parts, Settings(rank=RANK))
        seconds += time.process_time() - start
    return seconds


def whole(adapters: int, shapes: Any) -> float:
    """`merge` from files to a file; the shapes are those of all modules, or of the one that warms up."""
    import tempfile
    from pathlib import Path

    import msplora_analysis as ma

    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        for i in range(adapters):  # in processes of their own: their memory is none of ours
            writer = context.Process(target=_write, args=(Path(folder) / f"{i}", shapes, i))
            writer.start()
            writer.join()
        paths = [Path(folder) / f"{i}" for i in range(adapters)]
        start = time.process_time()
        ma.merge(paths, Path(folder) / "merged", method="svd", rank=RANK, dtype="float16")
        return time.process_time() - start


def _write(folder: Any, shapes: Any, seed: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    folder.mkdir()
    tensors = {}
    for i, (rows, cols) in enumerate(shapes):
        key = f"base_model.model.model.layers.{i // len(LAYER)}.mlp.linear{i % len(LAYER)}"
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((RANK, cols), np.float32).astype(np.float16)
        tensors[f"{key}.lora_B.weight"] = rng.standard_normal((rows, RANK), np.float32).astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["linear"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def pefts(adapters: int, shapes: Any) -> float:
    import torch

    seconds = 0.0
    for rows, cols in shapes:
        pairs = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in _factors(adapters, rows, cols)]
        start = time.process_time()
        deltas = [b @ a for a, b in pairs]
        whole = sum(deltas)
        u, sigma, vt = torch.linalg.svd(whole, full_matrices=True)
        _ = u[:, :RANK] @ torch.diag(sigma[:RANK]), vt[:RANK]
        seconds += time.process_time() - start
    return seconds


def _in_process(work: Any, adapters: int, shapes: Any, queue: Any) -> None:
    import numpy as np  # noqa: F401
    import torch  # noqa: F401

    work(adapters, [(256, 256)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = work(adapters, shapes)
    queue.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--modules", default=",".join(LAYER), help="of a layer, such as q,up")
    parser.add_argument("--peft", default="q", help="modules that PEFT's way is timed on; empty: none")
    parser.add_argument("--layers", type=int, help="merge files of so many layers, not modules in memory")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    own = whole if options.layers else ours
    for name, work, modules in (("msplora", own, options.modules), ("PEFT", pefts, options.peft)):
        shapes = [LAYER[module] for module in modules.split(",") if module]
        if not shapes:
            continue
        if work is whole:
            shapes *= options.layers
        queue = context.Queue()
        process = context.Process(target=_in_process, args=(work, options.adapters, shapes, queue))
        process.start()
        seconds, memory = queue.get()
        process.join()
        about = {"who": name, "adapters": options.adapters, "modules": modules, "number": len(shapes)}
        print(json.dumps(about | {"seconds": round(seconds, 2), "peak_mb": round(memory)}), flush=True)


if __name__ == "__main__":
    main()
