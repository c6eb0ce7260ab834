"""Table 1 of the paper on a small model: eleven methods, six tasks of GLUE, all-MiniLM-L6-v2.

    python study/table1.py train --data-dir glue --jobs 15
    python study/table1.py tables                       # redraws the published ones from runs.csv

Every method has the learning rate that its search chose (study/learning_rates/), 10 epochs, and the recipe of the task
for all else; AdaLoRA and PiSSA their own settings. The searches read parts of *train* alone, so the validation split,
scored at the last epoch, is a test set. `train` may be stopped and called again, also several times at once on one
folder, with other --seeds or on another GPU: what is complete is skipped. One seed of all comes after the other.

Sizes. Of QNLI, whose train file is a tenth of the official one (10,475 rows), 5,000 rows are trained on and 2,000
scored; of SST-2 5,000 are trained on; a shuffle with the seed 0 chooses them. The other tasks are whole.

    FOLDER/models/minilm                                the base model, as a folder
    FOLDER/data/                                        the rows of the tasks that are cut
    FOLDER/runs/minilm/<task>/<method>/seed-<n>/        run folders of msplora-train

Kept of a low-rank method's run are the checkpoint before training and the last, each with adapter and head; of MRPC
under LoRA and MSPLoRA that of every epoch. Of the other methods only the record is kept.

On a GPU, matrix products are in TF32. Many small runs share one well under NVIDIA MPS (nvidia-cuda-mps-control -d).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from itertools import product
from pathlib import Path

from calibration import Part, Run, chosen_rate, in_processes, is_trained, thin, train_with
from learning_rates import METHODS, TASKS, shuffled

SEEDS = (11, 12, 13, 14, 15)
CUT = {"qnli": {"train": 5000, "validation": 2000}, "sst2": {"train": 5000, "validation": None}}
WITHOUT_FACTORS = ("fft", "bitfit", "adapterdrop")
EVERY_EPOCH = (("mrpc", "lora-8"), ("mrpc", "msplora-8-4-2"))
NAMES = {
    "fft": "full fine-tuning",
    "bitfit": "BitFit",
    "adapterdrop": "AdapterDrop",
    "lora-8": "LoRA r = 8",
    "lora-5": "LoRA r = 5",
    "lora-2": "LoRA r = 2",
    "adalora": "AdaLoRA",
    "dylora": "DyLoRA",
    "pissa": "PiSSA",
    "lily": "Lily",
    "msplora-8-4-2": "MSPLoRA 8/4/2",
}
OURS = "msplora-8-4-2"


def train(options: argparse.Namespace) -> None:
    """Train what is not complete."""
    for task, sizes in CUT.items():
        for split, most in sizes.items():
            path = options.folder / "data" / f"{task}_{split}.jsonl"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"\n".join(shuffled(options.data_dir / path.name, 0)[:most]))
    failed = in_processes(Part(wanted, train_one, is_trained), options)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; call again to try them once more")


def wanted(options: argparse.Namespace) -> list[Run]:
    """The tasks of a method beside each other: some wait for the processor, others for the GPU."""
    runs = product(options.seeds, options.methods, options.tasks)
    return [Run("minilm", task, method, seed) for seed, method, task in runs]


def train_one(run: Run, options: argparse.Namespace) -> str:
    """Train one run and drop what is not kept; returns its outcome in words."""
    said = train_with(
        run,
        options,
        data_dir=options.folder / "data" if run.task in CUT else options.data_dir,
        epochs=options.epochs or 10,
        learning_rate=chosen_rate(run.task, run.method),
        **METHODS[run.method][1],
    )
    folder = run.folder(options)
    if run.method in WITHOUT_FACTORS:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    else:
        thin(folder, every_epoch=(run.task, run.method) in EVERY_EPOCH)
    return said


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    training = parts.add_parser("train")
    training.add_argument("--folder", type=Path, default=Path("runs/table1"), help="default: runs/table1")
    training.add_argument("--data-dir", type=Path, required=True, help="folder with {task}_train.jsonl[.gz]")
    training.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    training.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    training.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default: 11 to 15")
    training.add_argument("--epochs", type=int, help="default: 10")
    training.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    training.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    training.set_defaults(models=["minilm"])
    return parser.parse_args()


if __name__ == "__main__":
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    given = _options()
    {"train": train}[given.part](given)
