"""Adapters written by the safetensors library, and the accuracy that is promised of their spectra."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
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


def msplora_config(**changes: Any) -> dict[str, Any]:
    config = {
        "peft_type": "MSPLORA", "r": 8, "ranks": {"global": 5, "mid": 3, "layer": 2}, "lora_alpha": 16,
        "use_rslora": False, "mid_groups": 3,
    }  # fmt: skip
    return config | changes


def msplora_tensors(
    layers: Sequence[int],
    firsts: Sequence[int],
    ranks: dict[str, int],
    modules: Sequence[str] = ("query",),
    stack: str = "encoder.layer",
    rows: int = 20,
    cols: int = 18,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The layout of msplora_core: shared factors once, under the first layer of their group."""
    rng = np.random.default_rng(seed)
    owners = {"global": layers[:1], "mid": firsts, "layer": layers}
    tensors = {}
    for module in modules:
        for scale, rank in ranks.items():
            for layer in owners[scale]:
                key = f"base_model.model.{stack}.{layer}.self.{module}.msplora_{scale}"
                tensors[f"{key}.A"] = rng.standard_normal((rank, cols), dtype=np.float32)
                tensors[f"{key}.B"] = rng.standard_normal((rows, rank), dtype=np.float32)
    return tensors


def dense(tensors: dict[str, np.ndarray], key: str, alpha: float, rslora: bool = False) -> np.ndarray:
    """The update of one scale of one module, multiplied out in float64."""
    a, b = (tensors[f"base_model.model.{key}.{factor}"].astype(np.float64) for factor in "AB")
    return alpha / (math.sqrt(len(a)) if rslora else len(a)) * (b @ a)


def assert_promised(actual: np.ndarray, exact: np.ndarray) -> None:
    """The accuracy promised: relative for sigma >= 1e-5 sigma_1, absolute below."""
    exact = np.asarray(exact, dtype=np.float64)
    error = np.abs(np.asarray(actual) - exact)
    largest = exact.max(axis=-1, keepdims=True)
    allowed = np.where(exact >= 1e-5 * largest, 1e-5 * exact, 1e-7 * largest)
    assert (error <= allowed).all(), (actual, exact)


def assert_dense(spectra, metrics, expected):
    """The spectra and sizes of the tables are those of dense updates by their names."""
    assert set(spectra["name"]) == set(expected)
    for name, dense in expected.items():
        sigma = spectra[spectra["name"] == name]["sigma"].to_numpy()
        assert_promised(sigma, np.linalg.svd(dense.astype(float), compute_uv=False)[: len(sigma)])
        row = metrics[metrics["name"] == name].iloc[0]
        assert (row["rows"], row["cols"]) == dense.shape
