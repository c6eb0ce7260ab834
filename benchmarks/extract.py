"""LoRAs out of a full fine-tuning: ours beside mergekit's procedure, on layers of LLaMA-2-7B's size.

    python benchmarks/extract.py [--device cuda] [--modules q_proj,up_proj] [--rank 64] [--dtype bfloat16|float32]
    python benchmarks/extract.py --tiny       (small layers: only to see that all of it runs)

Two files of one layer's linear modules with random weights, once with a flat update (Gaussian noise, the slowest case)
and once with one that decays over 256 directions, as trained ones do. ``msplora``: ``msplora_analysis.extract``, from
files to an adapter on disk. ``mergekit``: what mergekit 0.1.5 does with a module (``scripts/extract_lora.py``), written
anew: both tensors read, subtracted in their type, all of torch.linalg.svd of that in float32, the square root of the
singular values into either factor, in the files' type; then saved. Each is a process of its own, with as many
threads as cores. Times and memory are without imports; memory is the most that was held. The
error is that of the factors as written, relative to the update's norm. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SIZES = {
    "q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096),
    "gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008),
}  # fmt: skip
LAYERS = 32


def make(folder: Path, kind: str, modules: list[str], dtype: torch.dtype, device: str, shrink: int) -> None:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    base, tuned = {}, {}
    for module in modules:
        rows, cols = (size // shrink for size in SIZES[module])
        weight = 0.02 * random(rows, cols)
        if kind == "flat":
            update = 2e-3 * random(rows, cols)
        else:
            scale = torch.arange(1, 257, device=device) ** -0.5
            update = 2e-3 * (random(rows, 256) * scale) @ random(256, cols) / 3 + 2e-5 * random(rows, cols)
        name = f"model.layers.0.{module}.weight"
        base[name], tuned[name] = weight.to(dtype).cpu(), (weight + update).to(dtype).cpu()
    for part, tensors in (("base", base), ("tuned", tuned)):
        (folder / part).mkdir(parents=True)
        save_file(tensors, folder / part / "model.safetensors")


def msplora(folder: Path, rank: int, device: str, dtype: str) -> None:
    import msplora_analysis as ma

    ma.extract(folder / "tuned", folder / "msplora", base=folder / "base", rank=rank, device=device, dtype=dtype)


def mergekit(folder: Path, rank: int, device: str, dtype: str) -> None:
    factors = {}
    paths = (folder / part / "model.safetensors" for part in ("tuned", "base"))
    tuned, base = (safe_open(path, "pt") for path in paths)
    for name in tuned.keys():  # noqa: SIM118
        difference = tuned.get_tensor(name).to(device) - base.get_tensor(name).to(device)
        u, sigma, vt = torch.linalg.svd(difference.float(), full_matrices=False)
        root = sigma[:rank].sqrt()
        unit = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{unit}.lora_A.weight"] = (root[:, None] * vt[:rank]).to(difference.dtype).cpu().contiguous()
        factors[f"{unit}.lora_B.weight"] = (u[:, :rank] * root).to(difference.dtype).cpu().contiguous()
    (folder / "mergekit").mkdir()
    save_file(factors, folder / "mergekit" / "adapter_model.safetensors")


def most_held(*, reset: bool = False) -> float:
    """The most memory, in MB, that this process held since it began, or since it was last asked to forget that."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def one(contender: str, folder: Path, rank: int, device: str, dtype: str) -> dict[str, float]:
    """A run of a contender in this process."""
    import numpy  # noqa: F401
    import pandas  # noqa: F401
    import scipy.linalg  # noqa: F401

    if device != "cpu":
        torch.linalg.svd(torch.eye(8, device=device))  # the libraries are loaded
        torch.cuda.reset_peak_memory_stats()
    before = most_held(reset=True)
    start = time.perf_counter()
    {"msplora": msplora, "mergekit": mergekit}[contender](folder, rank, device, dtype)
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "MB above imports": most_held() - before}
    if device != "cpu":
        found["GPU MB"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def errors(folder: Path, contender: str, device: str) -> float:
    """Of all modules together."""
    factors = load_file(folder / contender / "adapter_model.safetensors")
    tuned, base = (load_file(folder / part / "model.safetensors") for part in ("tuned", "base"))
    lost = whole = 0.0
    for name in tuned:
        unit = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (factors[f"{unit}.lora_{factor}.weight"].to(device).double() for factor in "AB")
        update = tuned[name].to(device).double() - base[name].to(device).double()
        whole += float(update.square().sum())
        lost += float((update - b @ a).square().sum())
    return (lost / whole) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modules", default=",".join(SIZES))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--kinds", default="decaying,flat")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], Path(args.one[1]), args.rank, args.device, args.dtype)))
        return
    modules, rank = args.modules.split(","), 4 if args.tiny else args.rank
    result: dict[str, Any] = {"rank": rank, "modules": modules, "dtype": args.dtype, "device": args.device}
    result["machine"] = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} threads"
    for kind in args.kinds.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make(folder, kind, modules, getattr(torch, args.dtype), args.device, 64 if args.tiny else 1)
            for contender in ("msplora", "mergekit"):
                words = [sys.executable, __file__, "--one", contender, str(folder), "--rank", str(rank)]
                words += ["--device", args.device, "--dtype", args.dtype]
                done = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
                found = json.loads(done) | {"error": errors(folder, contender, args.device)}
                result[f"{kind}: {contender}"] = found
                print(json.dumps({f"{kind}: {contender}": found}), flush=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
