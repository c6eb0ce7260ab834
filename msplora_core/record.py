"""The run folder: what may be written to, and the record of everything needed to repeat the run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import torch

import msplora_core
from msplora_core.data.loading import Split
from msplora_core.errors import TrainingError
from msplora_core.models import ModelSource
from msplora_core.pyramid import RANK_DECAY
from msplora_core.settings import Settings

RECORD_NAME = "run.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")


def check_output_dir(settings: Settings) -> Path | None:
    """Check that the run may be written to its folder, without touching it.

    Returns:
        The newest checkpoint when resuming, None for a fresh start.

    Raises:
        TrainingError: the folder holds something and neither resume nor overwrite was asked for, or the
            run to resume had other settings.
    """
    folder = settings.output_dir
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder}: is a file; give --output-dir a folder")
    if not folder.exists() or settings.overwrite or not any(folder.iterdir()):
        return None
    if not settings.resume:
        raise TrainingError(
            f"{folder}: the output folder is not empty; continue its run with --resume, delete the run in it "
            "with --overwrite, or give another --output-dir"
        )
    return _newest_checkpoint(settings)


def make_output_dir(settings: Settings) -> None:
    """Make the run folder; with overwrite, delete the run in it first."""
    folder = settings.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if settings.overwrite:
        for path in folder.iterdir():  # only what a run writes: the folder may be somebody's home
            if _CHECKPOINT.fullmatch(path.name):
                shutil.rmtree(path)
            elif path.name == RECORD_NAME:
                path.unlink()


def _newest_checkpoint(settings: Settings) -> Path | None:
    folder = settings.output_dir
    if (folder / RECORD_NAME).is_file():
        recorded = read(folder)["settings"]
        asked = json.loads(json.dumps(settings.what_matters()))
        changed = [
            f"{name} {recorded.get(name)!r} -> {asked[name]!r}" for name in asked if asked[name] != recorded.get(name)
        ]
        if changed:
            raise TrainingError(
                f"{folder}: the run to resume has other settings ({'; '.join(changed)}); repeat its settings, "
                "or start anew with --overwrite"
            )
    steps = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / "optimizer.pt").is_file()
    }
    return steps[max(steps)] if steps else None


def describe_run(settings: Settings, source: ModelSource, splits: dict[str, Split], model: Any) -> dict[str, Any]:
    """Everything needed to repeat the run, as JSON values.

    Args:
        model: The PEFT model; its parameters are counted once each, however many layers share them.
    """
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trainable.items() if ".modules_to_save." in name)
    total = sum(p.numel() for p in model.parameters())
    return {
        "settings": settings.what_matters(),
        "model": {
            "name": source.name,
            "class": type(model.get_base_model()).__name__,
            "weights_sha256": source.fingerprint(),
        },
        "parameters": {
            "adapter": sum(trainable.values()) - head,
            "head": head,
            "base": total - sum(trainable.values()),
        },
        "data": {
            name: {"source": split.source, "rows": len(split.rows), "sha256": split.fingerprint}
            for name, split in splits.items()
        },
        "versions": {"msplora": msplora_core.__version__, "python": platform.python_version()}
        | {library: importlib.metadata.version(library) for library in _LIBRARIES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }


def summary(run: dict[str, Any]) -> str:
    """One line about a run: method, model, task, parameter counts."""
    settings, parameters = run["settings"], run["parameters"]
    rank = settings["rank"]
    if settings["ranks"]:
        rank = ",".join(map(str, settings["ranks"].values()))
    elif settings["method"] == "msplora":
        rank = ",".join(str(rank // divisor) for divisor in RANK_DECAY.values())
    return (
        f"{settings['method']} (rank {rank}) on {run['model']['name']}, task {settings['task']} "
        f"({run['data']['train']['rows']} + {run['data']['validation']['rows']} examples), seed {settings['seed']}: "
        f"{parameters['adapter']:,} adapter parameters, {parameters['head']:,} in the head, "
        f"{parameters['base']:,} frozen"
    )


def read(folder: Path) -> dict[str, Any]:
    """Read a run's record.

    Raises:
        TrainingError: the record is not JSON.
    """
    path = folder / RECORD_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); start anew with --overwrite") from error


def write(folder: Path, run: dict[str, Any]) -> None:
    """Write a run's record, whole or not at all."""
    beside = folder / f".{RECORD_NAME}.new"
    beside.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, folder / RECORD_NAME)
