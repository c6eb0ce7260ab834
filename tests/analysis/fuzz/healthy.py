"""Runs that nothing is wrong with: what a mutation starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from adapters import lora_config, lora_tensors
from safetensors.numpy import save


def seeds() -> list[tuple[dict[str, np.ndarray], dict[str, Any] | None]]:
    """Adapters to start from: of PEFT, of msplora_core, and one without a configuration, as kohya writes it."""
    rng = np.random.default_rng(0)
    msplora = {}
    for layer in range(3):
        for scale, first in (("global", layer == 0), ("mid", True), ("layer", True)):
            if first:
                key = f"base_model.model.layer.{layer}.query.msplora_{scale}"
                msplora[f"{key}.A"] = rng.standard_normal((2, 6)).astype(np.float32)
                msplora[f"{key}.B"] = rng.standard_normal((5, 2)).astype(np.float16)
    kohya: dict[str, np.ndarray] = {}
    for key in ("lora_unet_down_0_attn", "lora_te_encoder_1_mlp"):
        kohya[f"{key}.lora_down.weight"] = rng.standard_normal((2, 6)).astype(np.float32)
        kohya[f"{key}.lora_up.weight"] = rng.standard_normal((5, 2)).astype(np.float32)
        kohya[f"{key}.alpha"] = np.array(1.0, np.float32)
    key = "base_model.model.layer.0.query"
    loha = {f"{key}.hada_w{i}_a": rng.standard_normal((5, 2)) for i in (1, 2)}
    loha |= {f"{key}.hada_w{i}_b": rng.standard_normal((2, 6)) for i in (1, 2)}
    lokr = {f"{key}.lokr_w1": rng.standard_normal((2, 3)), f"{key}.lokr_w2_a": rng.standard_normal((4, 2))}
    lokr |= {f"{key}.lokr_w2_b": rng.standard_normal((2, 5))}
    adalora = {f"{key}.lora_A": rng.standard_normal((2, 6)), f"{key}.lora_B": rng.standard_normal((5, 2))}
    adalora |= {f"{key}.lora_E": rng.standard_normal((2, 1))}
    scales = {"global": 2, "mid": 2, "layer": 2}
    patterns = {"layer.1": 2, "(x|y)+[0-9]?z": 2}
    return [
        (lora_tensors("layer.0.query", "layer.1.query"), lora_config(rank_pattern=patterns, target_modules=["query"])),
        (msplora, {"peft_type": "MSPLORA", "r": 8, "lora_alpha": 4, "ranks": scales, "mid_groups": 3}),
        (kohya, None),
        (loha, {"peft_type": "LOHA", "r": 2, "alpha": 4, "rank_pattern": {}, "alpha_pattern": {"a.*b": 2}}),
        (lokr, {"peft_type": "LOKR", "r": 2, "alpha": 4, "rank_pattern": {}, "alpha_pattern": {}}),
        (adalora, {"peft_type": "ADALORA", "r": 2, "lora_alpha": 4, "target_r": 2, "init_r": 2, "rank_pattern": None}),
    ]


SEEDS = seeds()
RECORD = {
    "settings": {"model": "m", "task": "cola", "method": "lora", "seed": 0, "rank": 2, "ranks": None, "epochs": 2},
    "metric": {"name": "matthews_correlation", "greater_is_better": True},
    "model": {"name": "m", "weights_sha256": {}},
    "parameters": {"adapter": 44, "head": 2, "base": 100},
    "versions": {"torch": "2.13.0"},
    "results": [
        {"epoch": epoch, "step": 7 * epoch, "train_loss": 0.5, "validation_loss": 0.5, "metric": 0.1}
        for epoch in (0, 1)
    ],
}
STATE = {
    "epoch": 1.0, "global_step": 7, "num_train_epochs": 2, "max_steps": 14, "stateful_callbacks": {},
    "train_batch_size": None, "best_model_checkpoint": None,
    "log_history": [{"loss": 0.5, "epoch": 1.0, "step": 7}, {"eval_loss": 0.4, "epoch": 1.0, "step": 7}],
}  # fmt: skip


def write_run(run: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None) -> Path:
    """A run with one checkpoint; returns its folder."""
    shutil.rmtree(run, ignore_errors=True)
    checkpoint = run / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(RECORD))
    (checkpoint / "trainer_state.json").write_text(json.dumps(STATE))
    if config is None:
        (checkpoint / "adapter.safetensors").write_bytes(save(tensors))
    else:
        (checkpoint / "adapter_model.safetensors").write_bytes(save(tensors))
        (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    return run


def write_model(folder: Path, *, shift: float = 0) -> Path:
    """A whole model in two parts, moved by rank 1 from that of another ``shift``."""
    folder.mkdir(parents=True)
    values = np.random.default_rng(0)
    whole = {f"{name}.weight": values.standard_normal((3, 4)).astype(np.float32) for name in ("x", "layer.0.y")}
    parts = {"a.safetensors": {"x.weight": whole["x.weight"] + np.float32(shift)}, "b.safetensors": whole}
    del whole["x.weight"]
    for name, part in parts.items():
        (folder / name).write_bytes(save(part))
    index = {"metadata": {"total_size": 96}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
