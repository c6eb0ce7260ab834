"""Do findings find? Runs with faults that were planted, beside healthy runs: what docs/findings.md is measured on.

    python study/faults.py plant runs/table1/runs runs/calibration/runs --jobs 2
    python study/faults.py train --data-dir glue --jobs 15     # two GPUs: --tasks qnli mrpc, and --tasks stsb sst2
    python study/fault_tables.py

`plant` needs no training: it takes runs that are there, healthy ones, and edits copies of them, at the last checkpoint.

    a layer             the update of one layer, drawn at random, times 2, 4, 10, 30
    all layers          of all, times 10, 30
    frozen layer        one layer as it was before training, where that was kept
    copied layer        one layer has the update of its neighbour
    not finite          one value is not a number

Runs are <folder>/<model>/<task>/<method>/seed-<n>, as study/table1.py and study/calibration.py leave them. All are
asked as they are; LoRA and MSPLoRA, of which a layer's own part is edited, with faults too.

`train` trains with a fault in it, LoRA r 8 and MSPLoRA 8/4/2, on at most 3,000 training and 500 validation rows of each
task (a shuffle with the seed 0 chooses them), 10 epochs, batches of 32, at the rates of study/calibration.py:

    healthy             no fault; then with the edits above
    learning rate       times 1/30, 3, 10, 30
    alpha               times 2, 8, 32
    frozen layers       1, 3 of them, not trained
    tied layers         2 neighbours, 6: one update for all of them, trained so (MSPLoRA: the layer part)
    noisy labels        a part of the training labels, shuffled among each other: 10, 30, 100 %
    rank                64, of the same alpha / rank
    half precision      gradients of the adapter in float16, times 1 (small ones are lost), 2^20, 2^24 (large ones
                        overflow), with nothing that looks after them, as loss scaling does

It may be stopped and called again. Every run is diagnosed at once, with the checkpoints of all epochs, and removed.

Files in --folder: planted/<run>.csv and <model>/<task>.csv, a row for each run: how many places each kind of finding
names, and the number that it holds against its threshold (study/signs.py); of a fault in some layers, in these alone.
kept/: spectra, measures and pairs of layers of each trained run, for findings that are still to be thought of.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from calibration import MODELS, base_model
from learning_rates import shuffled, write_rows
from safetensors.numpy import load_file, save_file
from searched import TASKS, Row, Run, call, train_all, train_run, training_options

from msplora_core.methods.lora import Lora
from msplora_core.methods.msplora import MSPLora
from msplora_core.names import RECORD, WEIGHTS

METHODS = {"lora-8": 8, "msplora-8-4-2": 8}
ROWS = {"train": 3000, "validation": 500}
LAYERS = {"minilm": 6, "smollm2": 30}
TRAINED: dict[str, tuple[float, ...]] = {
    "healthy": (1,),
    "learning rate": (10, 30, 3, 1 / 30),
    "alpha": (8, 32, 2),
    "frozen layers": (1, 3),
    "tied layers": (2, 6),
    "noisy labels": (1, 0.3, 0.1),
    "rank": (64,),
    "half precision": (2**20, 2**24, 1),
}
Tensors = dict[str, Any]

# Faults in files


def times(tensors: Tensors, before: Tensors, layers: set[int], strength: float) -> None:
    for name in _own(tensors, layers, "B"):
        tensors[name] = tensors[name] * strength


def frozen(tensors: Tensors, before: Tensors, layers: set[int], strength: float) -> None:
    tensors |= {name: before[name] for name in _own(tensors, layers, "AB")}


def copied(tensors: Tensors, before: Tensors, layers: set[int], strength: float) -> None:
    (layer,) = layers
    beside = layer + 1 if any(_own(tensors, {layer + 1}, "B")) else layer - 1
    for name in list(_own(tensors, layers, "AB")):
        tensors[name] = tensors[re.sub(rf"\.{layer}\.", f".{beside}.", name, count=1)]


def not_finite(tensors: Tensors, before: Tensors, layers: set[int], strength: float) -> None:
    name = next(_own(tensors, layers, "B"))
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] = float("nan")


def _own(tensors: Tensors, layers: set[int] | None, factors: str) -> Iterator[str]:
    """Names of the factors of some layers that belong to that layer alone; None: of all, shared ones too."""
    for name in tensors:
        found = re.search(r"\.(\d+)\..*(?:lora_([AB])\.weight|msplora_(\w+)\.([AB]))$", name)
        is_there = found and (layers is None or (found[3] in (None, "layer") and int(found[1]) in layers))
        if found and is_there and (found[2] or found[4]) in factors:
            yield name


Edit = Callable[[Tensors, Tensors, Any, float], None]
PLANTED: dict[str, tuple[Edit, tuple[float, ...]]] = {
    "a layer": (times, (2, 4, 10, 30)),
    "all layers": (times, (10, 30)),
    "frozen layer": (frozen, (1,)),
    "copied layer": (copied, (1,)),
    "not finite": (not_finite, (1,)),
}
EDITED = ("lora-8", "lora-5", "msplora-8-4-2", "msplora-8-8-8")


def plant(options: argparse.Namespace) -> None:
    """Ask the runs, and edited copies of them, that were not asked yet."""
    runs = [path.parent for folder in options.runs for path in sorted(folder.glob(f"*/*/*/*/{RECORD}"))]
    left = [run for run in runs if any(run.glob(f"*/{WEIGHTS}")) and not _planted(run, options.folder).is_file()]
    print(f"{len(runs)} runs, {len(left)} to ask", flush=True)
    with ProcessPoolExecutor(options.jobs) as pool:
        for said in pool.map(partial(plant_one, out=options.folder, seeds=options.seeds), left):
            print(said, flush=True)


def _planted(run: Path, out: Path) -> Path:
    return out / "planted" / ("_".join(run.parts[-4:]) + ".csv")


def plant_one(run: Path, out: Path, seeds: list[int] | None = None) -> str:
    """Write a row for a run as it is, and for each fault in a copy of it (None: for any seed)."""
    model, task, method, _ = run.parts[-4:]
    record = json.loads((run / RECORD).read_text(encoding="utf-8"))
    about = {"model": model, "task": task, "method": method, "seed": record["settings"]["seed"]}
    about |= {"checkpoints": len(list(run.glob(f"*/{WEIGHTS}"))), "metric": record["results"][-1]["metric"]}
    rows = [about | {"fault": "healthy", "strength": 1, "layers": ""} | asked(run)]
    file = max(run.glob(f"*/{WEIGHTS}"), key=lambda path: int(path.parent.name.rpartition("-")[2]))
    first = run / "checkpoint-0" / WEIGHTS
    tensors, before = load_file(file), load_file(first) if first.is_file() else {}
    there = sorted({int(re.search(r"\.(\d+)\.", name)[1]) for name in _own(tensors, None, "B")})  # type: ignore[index]
    is_edited = method in EDITED and (seeds is None or about["seed"] in seeds)
    for fault, (edit, strengths) in PLANTED.items() if is_edited else ():
        if fault == "frozen layer" and not before:
            continue
        layer = random.Random(f"{run.parts[-4:]} {fault}").choice(there)
        layers = None if fault == "all layers" else {layer}
        for strength in strengths:
            changed = dict(tensors)
            edit(changed, before, layers, strength)
            with tempfile.TemporaryDirectory() as name:
                copy = Path(name) / run.name
                shutil.copytree(run, copy)
                save_file(changed, copy / file.relative_to(run))
                place = "" if layers is None else layer
                rows.append(about | {"fault": fault, "strength": strength, "layers": place} | asked(copy, layers))
    path = _planted(run, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as written:
        writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path.stem


def asked(run: Path, layers: set[int] | None = None, keep: Path | None = None) -> Row:
    """What `diagnose` finds in a run, in some layers of it or anywhere.

    Args:
        run: The run folder.
        layers: Where the fault is. None: everywhere.
        keep: Folder for the tables that findings are made of. None: they are not kept.
    """
    from signs import signs

    from msplora_analysis.ask.evidence import gather
    from msplora_analysis.options import Execution, Options

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        evidence = gather([run], Options(), Execution(cache=False))
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for name in ("spectra", "metrics", "pairs", "scales"):
            if len(table := getattr(evidence, name)):
                table.astype(dict.fromkeys(table.select_dtypes("float64"), "float32")).to_parquet(
                    keep / f"{name}.parquet", index=False
                )
    return signs(evidence, layers)


# Faults in training


@dataclass(frozen=True)
class Fault:
    """What is done to an adapter just before it is trained; a part of a method."""

    frozen: tuple[int, ...] = ()
    """Layers that are not trained."""
    tied: tuple[int, ...] = ()
    """Layers that share one update."""
    half: float = 0
    """What gradients are multiplied by while they are in float16; 0: they are not."""

    def adapt(self, base_model: Any, task_type: str) -> Any:
        model = super().adapt(base_model, task_type)  # type: ignore[misc]
        own = own_parts(model)
        for parameter in (p for layer in self.frozen for part in own[layer] for p in part.parameters()):
            parameter.requires_grad_(False)
        for layer in self.tied[1:]:
            tie(own[layer], own[self.tied[0]])
        for name, parameter in model.named_parameters():
            if self.half and parameter.requires_grad and "lora_" in name:
                parameter.register_hook(lambda gradient: (gradient * self.half).half().float() / self.half)
        return model


@dataclass(frozen=True)
class FaultyLora(Fault, Lora):
    """LoRA with a fault."""


@dataclass(frozen=True)
class FaultyMSPLora(Fault, MSPLora):
    """MSPLoRA with a fault."""


def own_parts(model: Any) -> dict[int, list[Any]]:
    """Of each layer, the dictionaries of the modules that hold its own factors: in one order for all layers."""
    found: dict[int, list[Any]] = {}
    for name, module in model.named_modules():
        parts = [getattr(module, part) for part in ("lora_A", "lora_B", "msplora_layer") if hasattr(module, part)]
        if parts:
            found.setdefault(int(re.search(r"\.(\d+)\.", name)[1]), []).extend(parts)  # type: ignore[index]
    return found


def tie(parts: list[Any], to: list[Any]) -> None:
    """Let modules be those of another layer: the same objects, with one gradient."""
    for part, other in zip(parts, to, strict=True):
        part["default"] = other["default"]


CONFIGURATIONS = {
    f"{method} {fault} {strength:.3g}": (method, fault, strength)
    for fault, strengths in TRAINED.items()
    for strength in strengths
    for method in METHODS
}


def train(options: argparse.Namespace) -> None:
    """Train what is not trained yet."""
    options.model, name = str(base_model(options.model, options)), options.model
    options.folder /= name
    for task, split in product(options.tasks, ROWS):
        lines = shuffled(options.data_dir / f"{task}_{split}.jsonl", 0)[: ROWS[split]]
        write_rows(lines, options.folder / "data" / "clean" / f"{task}_{split}.jsonl")
        for part in TRAINED["noisy labels"]:
            noisy = lines if split == "validation" else with_noise(lines, part)
            write_rows(noisy, options.folder / "data" / f"noise-{part:.3g}" / f"{task}_{split}.jsonl")
    train_all(options, partial(wanted, options, name), partial(train_one, name))


def with_noise(lines: list[bytes], part: float) -> list[bytes]:
    """The rows, of which some have their labels shuffled among each other."""
    rows = [json.loads(line) for line in lines]
    drawn = random.Random(0)
    noisy = drawn.sample(range(len(rows)), round(part * len(rows)))
    labels = [rows[i]["label"] for i in noisy]
    drawn.shuffle(labels)
    for i, label in zip(noisy, labels, strict=True):
        rows[i]["label"] = label
    return [json.dumps(row, ensure_ascii=False).encode() for row in rows]


def wanted(options: argparse.Namespace, name: str, task: str, rows: dict[Run, Row]) -> Iterator[Run]:
    """A seed of all after the other."""
    for seed, configuration in product(options.seeds, CONFIGURATIONS):
        method, fault, strength = CONFIGURATIONS[configuration]
        if fault in options.faults:
            rate = MODELS[name].rate(task, method) * (strength if fault == "learning rate" else 1)
            yield Run("faults", configuration, float(f"{rate:.4g}"), seed)


def train_one(name: str, task: str, run: Run, options: argparse.Namespace) -> Row:
    """Train and ask one run; a healthy one also with the faults of `plant`."""
    method, fault, strength = CONFIGURATIONS[run.configuration]
    layers: tuple[int, ...] = ()
    if fault in ("frozen layers", "tied layers"):
        first = random.Random(f"{task} {run.seed} {fault}").randint(0, LAYERS[name] - int(strength))
        layers = tuple(range(first, first + int(strength)))

    def look(folder: Path) -> Row:
        path = options.folder / "kept" / task / f"{run.configuration.replace(' ', '_')}_seed-{run.seed}"
        row = asked(folder, set(layers) or None, keep=path)
        if fault == "healthy":
            at = folder.rename(folder.parent / f"seed-{run.seed}")
            (folder.parent / name / task / method).mkdir(parents=True)
            plant_one(at.rename(folder.parent / name / task / method / at.name), options.folder.parent)
        return row

    about = {"model": name, "method": method, "fault": fault, "strength": strength}
    return (
        about
        | train_run(
            task,
            run,
            options,
            look,
            method=method_of(method, fault, strength, layers),
            data_dir=options.folder / "data" / (f"noise-{strength:.3g}" if fault == "noisy labels" else "clean"),
            batch_size=options.batch_size,
        )
        | {"layers": " ".join(map(str, layers))}
    )


def method_of(method: str, fault: str, strength: float, layers: tuple[int, ...]) -> Lora:
    """The method with its fault."""
    rank = int(strength) if fault == "rank" else METHODS[method]
    alpha = 16 * rank / METHODS[method] * (strength if fault == "alpha" else 1)
    wrong: dict[str, Any] = {"frozen layers": {"frozen": layers}, "tied layers": {"tied": layers}}.get(fault, {})
    wrong |= {"half": strength} if fault == "half precision" else {}
    return (FaultyLora if method == "lora-8" else FaultyMSPLora)(rank=rank, lora_alpha=alpha, **wrong)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="where the rows go (runs/faults)")
    parts = parser.add_subparsers(dest="part", required=True)
    planting = parts.add_parser("plant")
    planting.add_argument("runs", nargs="+", type=Path, help="folders of <model>/<task>/<method>/seed-<n>")
    planting.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    planting.add_argument("--seeds", nargs="+", type=int, help="copies of these alone are edited (default: of all)")
    training = parts.add_parser("train")
    training_options(training, seeds=[21, 22], tasks=TASKS, batch_size=32)
    training.add_argument("--model", default="minilm", choices=LAYERS, help="default: minilm")
    training.add_argument("--faults", nargs="+", choices=TRAINED, default=list(TRAINED))
    training.add_argument("--epochs", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    call({"plant": plant, "train": train}, _options())
