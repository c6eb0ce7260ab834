"""Weights of safetensors, and the JSON beside them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fuzz.healthy import write_model
from fuzz.values import TEXTS, mutate_bytes, mutate_json, mutated_text

Spoiler = Callable[[random.Random, Path, dict[str, np.ndarray]], Path]


def spoil_header(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The header of the weights."""
    file = next((run / "checkpoint-7").glob("*.safetensors"))
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.5:
        file.write_bytes(mutate_bytes(rng, content, 8 + size))
    else:
        header = json.loads(content[8 : 8 + size])
        for _ in range(rng.randint(1, 3)):
            header = mutate_json(rng, header, list(tensors))
        new = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])
    return rng.choice([run, file])


def spoil_name(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The names of modules, in a file that is whole."""
    file = next((run / "checkpoint-7").glob("*.safetensors"))
    old, new = rng.choice(["query", "layer", "0", "mlp", "attn"]), rng.choice(TEXTS)
    file.write_bytes(save({name.replace(old, new): values for name, values in tensors.items()}))
    return run


def spoil_values(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The numbers: NaN, the largest and the smallest."""
    file = next((run / "checkpoint-7").glob("*.safetensors"))
    changed = {name: values.copy() for name, values in tensors.items()}
    for values in rng.sample(list(changed.values()), k=rng.randint(1, 2)):
        edge = np.finfo(values.dtype)
        odd = rng.choice([np.nan, np.inf, edge.max, edge.tiny, edge.smallest_subnormal, 0, -1])
        values.reshape(-1)[: rng.randint(1, values.size)] = odd
    file.write_bytes(save(changed))
    return run


def spoil_json(name: str) -> Spoiler:
    """A JSON file."""

    def spoil(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
        file = next(iter(run.rglob(name)), run / name)
        if not file.exists():
            file = run / "run.json"
        file.write_bytes(mutated_text(rng, file.read_bytes(), list(tensors)))
        return run

    return spoil


def spoil_index(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The index of a whole model in parts, or one of these; it is read with itself or its healthy like as its base."""
    folder = write_model(run / "model", shift=1)
    spoilt = rng.choice([folder / "model.safetensors.index.json", folder / "a.safetensors"])
    content = spoilt.read_bytes()
    text = mutate_bytes(rng, content, 300) if spoilt.stem == "a" else mutated_text(rng, content, ["x.weight"])
    spoilt.write_bytes(text)
    return folder
