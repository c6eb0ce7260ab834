"""Runs that tests of the report read: written by the safetensors library, with all that training leaves beside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from adapters import lora_config, lora_tensors, msplora_config, msplora_tensors, write_adapter

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"
RANKS = {"global": 8, "mid": 8, "layer": 8}


def grown(tensors: dict[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """B at this share of its end: zero at the start of a training."""
    return {
        key: values * np.float32(share) if key.endswith((".B", "lora_B.weight")) else values
        for key, values in tensors.items()
    }


def write_state(checkpoint: Path, epoch: int) -> None:
    """What Trainer writes at ``epoch``: the log of all epochs until then."""
    log = [{"epoch": 0, "step": 0, "eval_loss": 0.7, "eval_accuracy": 0.5, "eval_runtime": 1.5}]
    for done in range(1, epoch + 1):
        log.append({"epoch": done, "step": 10 * done, "loss": 0.6 / done, "learning_rate": 1e-3})
        log.append({"epoch": done, "step": 10 * done, "eval_loss": 0.7 / done, "eval_accuracy": 1 - 0.5 / done})
    state = {"epoch": epoch, "global_step": 10 * epoch, "log_history": log}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))


def write_msplora(folder: Path, epochs: int, layers: int = 12, modules: tuple[str, ...] = ("query", "value")) -> Path:
    """A run of MSPLoRA 8/8/8 with a checkpoint of every epoch from 0."""
    tensors = msplora_tensors(range(layers), [0, layers // 3, 2 * layers // 3], RANKS, modules, seed=1)
    for epoch in range(epochs + 1):
        checkpoint = folder / f"checkpoint-{10 * epoch}"
        write_adapter(checkpoint, grown(tensors, epoch / epochs), msplora_config(ranks=RANKS))
        write_state(checkpoint, epoch)
    return folder


def write_lora(folder: Path, epochs: int, layers: int = 3, seed: int = 0) -> Path:
    """A run of LoRA r=4 on query and value, with a run.json."""
    names = [f"encoder.layer.{layer}.self.{module}" for layer in range(layers) for module in ("query", "value")]
    tensors = lora_tensors(*names, rank=4, rows=12, cols=10, seed=seed)
    for epoch in range(epochs + 1):
        checkpoint = folder / f"checkpoint-{10 * epoch}"
        write_adapter(checkpoint, grown(tensors, epoch / epochs), lora_config(r=4))
        write_state(checkpoint, epoch)
    settings = {"method": "lora", "model": "tiny", "task": "cola", "seed": seed, "learning_rate": 0.001}
    (folder / "run.json").write_text(json.dumps({"settings": settings, "versions": {"torch": "2.13.0"}}))
    return folder


def write_hostile(folder: Path) -> Path:
    """Two layers whose module, configuration and settings hold what a page must not run."""
    tensors = lora_tensors(*(f"encoder.layer.{layer}.self.{HOSTILE}" for layer in range(2)), rank=2)
    write_adapter(
        folder / "checkpoint-1", tensors, lora_config(base_model_name_or_path=HOSTILE, note={HOSTILE: HOSTILE})
    )
    (folder / "run.json").write_text(json.dumps({"settings": {"task": HOSTILE, "method": HOSTILE, HOSTILE: 1}}))
    state = {"epoch": 1, "global_step": 1, "log_history": [{"epoch": 1, f"eval_{HOSTILE}": 0.5, "loss": 1.0}]}
    (folder / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    return folder
