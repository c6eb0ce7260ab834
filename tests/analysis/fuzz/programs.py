"""Adapters as other programs keep them."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fuzz.values import NUMBERS, TEXTS, mutate_bytes, mutated_text


def spoil_gguf(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """An adapter of llama.cpp: its header, mostly."""
    content = bytearray(_gguf())
    shutil.rmtree(run / "checkpoint-7")
    if rng.random() < 0.5:  # a number of the header, by one that hurts
        at = rng.randrange(4, len(content) - 200)
        content[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 7, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]))
    else:
        content = bytearray(mutate_bytes(rng, bytes(content), rng.choice([400, None])))
    (run / "lora.gguf").write_bytes(content)
    return rng.choice([run, run / "lora.gguf"])


@cache
def _gguf() -> bytes:
    import gguf

    values = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        writer = gguf.GGUFWriter(Path(root) / "lora.gguf", "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 6)
        writer.add_array("adapter.tags", ["a", "b"])
        for layer in range(2):
            for key, shape in (("a", (2, 6)), ("b", (5, 2))):
                array = values.standard_normal(shape).astype(np.float16 if layer else np.float32)
                writer.add_tensor(f"blk.{layer}.attn_q.weight.lora_{key}", array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(root) / "lora.gguf").read_bytes()


def spoil_mlx(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """An adapter of MLX-LM."""
    values = np.random.default_rng(0)
    shutil.rmtree(run / "checkpoint-7")
    parts = (("a", (6, 2)), ("b", (2, 5)))
    weights = {f"model.layers.{i}.q.lora_{key}": values.standard_normal(shape) for i in (0, 1) for key, shape in parts}
    content = save(weights)
    parameters = {"rank": 2, "scale": 2.0, "dropout": 0}
    config = json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters})
    if rng.random() < 0.4:
        content = mutate_bytes(rng, content, 400)
        (run / "adapter_config.json").write_text(config)
    else:
        (run / "adapter_config.json").write_bytes(mutated_text(rng, config.encode(), ["scale", "lora_parameters"]))
    (run / "adapters.safetensors").write_bytes(content)
    return run


YAML = {
    "model_config.yaml": "head_size: 4\nn_head: 4\nn_query_groups: 1\nname: x\n",
    "hyperparameters.yaml": "lora_r: 2\nlora_alpha: 6\nlora_query: true\nlora_value: true\ntrain:\n  lora_r: 9\n",
}
_YAML_WORDS = "*a { | > 1e400 0x10 1:30 .inf .nan yes 2026-01-01 0 -1 ~ ---"
YAML_WORDS = [*_YAML_WORDS.split(), "\t", "&a [*a]", "&a {<<: *a}", "? x", "!!python/object/apply:os.system [x]"]
YAML_WORDS += ["9" * 400, "[" * 3000, "- " * 3000]


def spoil_yaml(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The configuration of an adapter of litgpt."""
    shutil.rmtree(run / "checkpoint-7")
    (run / "lit_model.pth.lora").write_bytes(_litgpt())
    spoilt = rng.choice(list(YAML))
    for name, text in YAML.items():
        lines = text.splitlines()
        if name == spoilt:
            for _ in range(rng.randint(1, 3)):
                key, _, value = lines[at := rng.randrange(len(lines))].partition(": ")
                new = rng.choice([*YAML_WORDS, *TEXTS, str(rng.choice(NUMBERS[:-2])), value])
                lines[at] = f"{key}: {new}" if rng.random() < 0.8 else f"{new}: {value}"
        content = "\n".join(lines).encode()
        (run / name).write_bytes(mutate_bytes(rng, content) if name == spoilt and rng.random() < 0.3 else content)
    return run


@cache
def _litgpt() -> bytes:
    import torch

    buffer, part = io.BytesIO(), "transformer.h.1.attn"
    shapes = {"qkv.lora_A": (4, 5), "qkv.lora_B": (20, 2), "proj.lora_A": (2, 5), "proj.lora_B": (7, 2)}
    torch.save({"model": {f"{part}.{name}": torch.ones(shape) for name, shape in shapes.items()}}, buffer)
    return buffer.getvalue()
