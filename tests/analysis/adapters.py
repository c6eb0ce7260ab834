"""Adapters written by the safetensors library, and the accuracy that is promised of their spectra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def lora_config(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", **changes}


def lora_tensors(*names: str, rank: int = 2, rows: int = 5, cols: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 factors of each module, under the keys that PEFT writes."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in names:
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((rank, cols), dtype=np.float32)
        tensors[f"{key}.lora_B.weight"] = rng.standard_normal((rows, rank), dtype=np.float32)
    return tensors


def write_adapter(
    folder: Path,
    tensors: dict[str, np.ndarray] | None = None,
    config: dict[str, Any] | None = None,
    epoch: float | None = None,
) -> Path:
    """An adapter folder; with ``epoch``, a trainer_state.json too. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = lora_tensors("layer.0.query")
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config or lora_config()))
    if epoch is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"epoch": epoch, "global_step": 0}))
    return folder


def assert_promised(actual: np.ndarray, exact: np.ndarray) -> None:
    """The accuracy promised: relative for sigma >= 1e-5 sigma_1, absolute below."""
    exact = np.asarray(exact, dtype=np.float64)
    error = np.abs(np.asarray(actual) - exact)
    largest = exact.max(axis=-1, keepdims=True)
    allowed = np.where(exact >= 1e-5 * largest, 1e-5 * exact, 1e-7 * largest)
    assert (error <= allowed).all(), (actual, exact)
