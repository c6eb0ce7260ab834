"""Are layers redundant? The causal test: layers of a trained LoRA are tied, tuned for an epoch, and scored.

    python study/ties.py tune --runs runs/table1/runs/minilm --data-dir glue --jobs 15
    python study/ties.py tables

From a LoRA r 8 on query and value of all-MiniLM-L6-v2 (study/table1.py) are made, each by a singular value
decomposition the nearest in the Frobenius norm,

    r 8                    the adapter as it is
    r 6, r 4               each layer cut to a lower rank
    inputs, neighbours     each two neighbours (0 and 1, 2 and 3, 4 and 5) share their A, of rank 8; as large as r 6
    inputs, others         each layer shares its A with one drawn at random that is no neighbour
    outputs, ...           they share their B
    updates, ...           they share the whole update; as large as r 4

Every one starts with the original's head and equal norms of its factors, keeps alpha / rank of 2, and is tuned for one
epoch on at most 4,000 rows, at 0.3 of the original's learning rate, which falls to 0. A tied factor is one parameter,
with one gradient. At most 2,000 rows of the validation split are scored before and after. If layers repeat each other,
neighbours can share what others cannot, and sharing costs less than a lower rank does.

Files in --folder: <task>.csv, a row a training, appended as it ends. `tables` writes runs.csv, and of it ties.csv and
ties.png: means of paired differences, with a 95 % interval by t over seeds.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from calibration import base_model, chosen_rate
from faults import own_parts, tie
from safetensors.torch import load_file
from searched import TASKS, Row, Run, all_runs, call, train_all, train_run, training_options, write_test_rows

from msplora_core.methods.lora import Lora
from msplora_core.names import WEIGHTS

ORIGINAL = 8
LAYERS = 6
RATE = 0.3
NEIGHBOURS = ((0, 1), (2, 3), (4, 5))
SHARED = {"inputs": slice(0, None, 2), "outputs": slice(1, None, 2), "updates": slice(None)}
"""Which of a layer's factors, A and B of each module in turn, are shared."""
CUTS = {"r 8": 8, "r 6": 6, "r 4": 4}
CONFIGURATIONS = [*CUTS, *(f"{shared}, {whose}" for whose in ("neighbours", "others") for shared in SHARED)]
COMPARED = {f"{shared}, {whose} − {cut}": (f"{shared}, {whose}", cut)
            for shared, cut in (("inputs", "r 6"), ("outputs", "r 6"), ("updates", "r 4"))
            for whose in ("neighbours", "others")}  # fmt: skip
COMPARED |= {f"{shared}, neighbours − others": (f"{shared}, neighbours", f"{shared}, others") for shared in SHARED}
COMPARED |= {"r 6 − r 8": ("r 6", "r 8"), "r 4 − r 8": ("r 4", "r 8")}


@dataclass(frozen=True)
class Started(Lora):
    """LoRA that starts from a trained one, cut or tied."""

    start: Path | None = None
    shared: str = ""
    """What layers share; nothing: they are cut to the rank."""
    pairs: tuple[tuple[int, int], ...] = ()

    def adapt(self, base_model: Any, task_type: str) -> Any:
        import torch
        from peft import set_peft_model_state_dict

        model = super().adapt(base_model, task_type)
        tensors = load_file(self.start / WEIGHTS)  # type: ignore[operator]
        head = {name: tensor for name, tensor in tensors.items() if "lora_" not in name}
        set_peft_model_state_dict(model, head)
        factors = {
            name: [module.lora_A["default"].weight, module.lora_B["default"].weight]
            for name, module in model.named_modules()
            if hasattr(module, "lora_A")
        }
        updates = {
            name: tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
            for name in factors
        }
        groups = self.pairs or tuple((layer,) for layer in range(LAYERS))
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in factors)
        for kind, group in product(kinds, groups):
            names = [next(n for n in factors if f".{layer}." in n and n.endswith(kind)) for layer in group]
            fitted = together([updates[name] for name in names], self.shared, self.rank)
            for name, (a, b) in zip(names, fitted, strict=True):
                with torch.no_grad():
                    factors[name][0].copy_(a)
                    factors[name][1].copy_(b)
        own = own_parts(model)
        for first, *others in self.pairs:
            for other in others:
                tie(own[other][SHARED[self.shared]], own[first][SHARED[self.shared]])
        return model


def together(updates: list[Any], shared: str, rank: int) -> list[tuple[Any, Any]]:
    """A and B of each update, of a rank: the nearest to all where they share one of them, or both.

    Args:
        updates: (out, in) each. One alone is cut.
        shared: ``inputs``: they have one A; ``outputs``: one B; ``updates``: both.
        rank: That of the factors.
    """
    import torch

    along = {"inputs": torch.vstack, "outputs": torch.hstack}.get(shared, lambda parts: sum(parts) / len(parts))
    u, s, v = torch.linalg.svd(along(updates), full_matrices=False)
    a, b = s[:rank].sqrt()[:, None] * v[:rank], u[:, :rank] * s[:rank].sqrt()
    if shared == "inputs":
        return [(a, part) for part in b.chunk(len(updates))]
    if shared == "outputs":
        return [(part, b) for part in a.chunk(len(updates), dim=1)]
    return [(a, b)] * len(updates)


def others(seed: str) -> tuple[tuple[int, int], ...]:
    """Each layer with another that is no neighbour of it, drawn at random."""
    drawn = random.Random(seed)
    while True:
        order = drawn.sample(range(LAYERS), LAYERS)
        pairs = [(min(pair), max(pair)) for pair in zip(order[::2], order[1::2], strict=True)]
        if all(high - low > 1 for low, high in pairs):
            return tuple(sorted(pairs))


def tune(options: argparse.Namespace) -> None:
    """Tune what is not tuned yet."""
    options.model = str(base_model("minilm", options))
    options.data_dir = write_test_rows(options)
    train_all(options, partial(wanted, options), train_one)


def wanted(options: argparse.Namespace, task: str, rows: dict[Run, Row]) -> Iterator[Run]:
    """A seed of all after the other, where its original is there."""
    for seed in options.seeds:
        if (options.runs / task / "lora-8" / f"seed-{seed}").is_dir():
            rate = float(f"{RATE * chosen_rate(task, 'lora-8'):.4g}")
            yield from (Run("tuned", name, rate, seed) for name in options.configurations)


def train_one(task: str, run: Run, options: argparse.Namespace) -> Row:
    """Tune one run; returns its row: ``first`` is the score before."""
    original = options.runs / task / "lora-8" / f"seed-{run.seed}"
    start = max(original.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    rank = CUTS.get(run.configuration, ORIGINAL)
    shared, _, whose = run.configuration.partition(", ") if run.configuration not in CUTS else ("", "", "")
    pairs = {"neighbours": NEIGHBOURS, "others": others(f"{task} {run.seed}")}.get(whose, ())
    method = Started(rank=rank, lora_alpha=2 * rank, start=start, shared=shared, pairs=pairs)
    row = train_run(task, run, options, method=method, data_dir=options.data_dir)
    return row | {"pairs": " ".join(f"{low}-{high}" for low, high in pairs)}


def tables(options: argparse.Namespace) -> None:
    """Write runs.csv of the rows, if there are any, and of runs.csv the table and its picture."""
    import pandas as pd
    from paired import draw, estimates, groups_of

    runs = all_runs(options, TASKS)
    found_tables = []
    for when, column in (("before", "first"), ("after", "last")):
        scores = runs.pivot_table(index=["task", "seed"], columns="configuration", values=column).dropna()
        there = {name: both for name, both in COMPARED.items() if set(both) <= set(scores)}
        minus = pd.DataFrame({name: scores[a] - scores[b] for name, (a, b) in there.items()})
        groups = groups_of([task for task in TASKS if task in scores.index.get_level_values("task")])
        found_tables.append(estimates(minus, groups).assign(tuning=when))
        print(when, scores.groupby("task").mean().mean().round(4).to_dict(), len(scores))
    table = pd.concat(found_tables)
    table.to_csv(options.out / "ties.csv", index=False, lineterminator="\n")
    after = table[table["tuning"] == "after"]
    draw(after, options.out / "ties.png", "metric × 100 after an epoch (paired by seed, 95 % intervals)")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/ties"), help="where the rows go (runs/ties)")
    parts = parser.add_subparsers(dest="part", required=True)
    tuning = parts.add_parser("tune")
    tuning.add_argument("--runs", type=Path, required=True, help="folder with <task>/lora-8/seed-<n>")
    training_options(tuning, seeds=[11, 12, 13, 14], tasks=TASKS)
    tuning.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=CONFIGURATIONS)
    tuning.add_argument("--epochs", type=int, default=1)
    drawing = parts.add_parser("tables")
    drawing.add_argument("--out", type=Path, default=Path("figures/ties"), help="default: figures/ties")
    return parser.parse_args()


if __name__ == "__main__":
    call({"tune": tune, "tables": tables}, _options())
