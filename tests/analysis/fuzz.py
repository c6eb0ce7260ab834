"""Mutated adapters through all of ``load_tables``: the only outcomes are tables, or an AnalysisError of one line.

    python tests/analysis/fuzz.py --count 20000 --seed 0

Half of the mutations damage the bytes of a file, half replace parts of its JSON (header, config, state)
by values that are likely to hurt. Every adapter, and what went wrong, can be made again from its seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from adapters import lora_config, lora_tensors
from safetensors.numpy import save

from msplora_analysis import AnalysisError, load_tables

NUMBERS = [0, 1, 2, 3, 4, 8, -1, 1.5, 1e300, float("nan"), 2**31, 2**53, 2**63, 2**64, 10**25, 10**400]
WORDS = ["", "a", "F32", "F16", "BF16", "I64", "F4", "none", "all", "\n", "\0", "\x1b[1m"]
WORDS += ["LORA", "MSPLORA", "LOHA", "LOKR", "ADALORA", "VERA", "VBLORA", "DELORA", "GRALORA", "OFT", "IA3", "RANDLORA"]
WORDS += [
    "../x",
    "(",
    ".*",
    "\ud800",
    "query",
    "base_model.model.",
    "layer.0.query",
    "__metadata__",
    "global",
    "é" * 50,
]
KEYS = ["r", "lora_alpha", "peft_type", "rank_pattern", "alpha_pattern", "ranks", "use_rslora", "bias", "use_dora"]
KEYS += ["modules_to_save", "target_modules", "mid_groups", "dtype", "shape", "data_offsets", "__metadata__", "alpha"]
KEYS += ["lora_bias", "trainable_token_indices", "rank", "module_dropout", "fan_in_fan_out", "layers_to_transform"]
PARTS = ["lora_A", "lora_B", "lora_down", "lora_up", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1"]
PARTS += ["lokr_w2", "lokr_w1_a", "lokr_t2", "msplora_global.A", "msplora_layer.B", "lora_embedding_A", "oft_blocks"]
PARTS += ["lora_magnitude_vector", "alpha", "diff", "lora_E", "vera_lambda_b", "lora_a", "lora_b", "weight", "bias"]


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
    return [
        (lora_tensors("layer.0.query", "layer.1.query"), lora_config(rank_pattern={"layer.1": 2})),
        (msplora, {"peft_type": "MSPLORA", "r": 8, "lora_alpha": 4, "ranks": scales, "mid_groups": 3}),
        (kohya, None),
        (loha, {"peft_type": "LOHA", "r": 2, "alpha": 4, "rank_pattern": {}, "alpha_pattern": {}}),
        (lokr, {"peft_type": "LOKR", "r": 2, "alpha": 4, "rank_pattern": {}, "alpha_pattern": {}}),
        (adalora, {"peft_type": "ADALORA", "r": 2, "lora_alpha": 4, "target_r": 2, "init_r": 2, "rank_pattern": None}),
    ]


def value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value."""
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice([*WORDS, *KEYS])
    if kind == 4:
        return rng.choice([None, True, False])
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice([*KEYS, *WORDS])): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutate_json(rng: random.Random, node: Any, keys: list[str]) -> Any:
    """One change somewhere in ``node``."""
    inside = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    if not inside or rng.random() < 0.1:
        if isinstance(node, int) and not isinstance(node, bool) and rng.random() < 0.7:
            return node + rng.choice([-8, -4, -1, 1, 4, 8, 24])
        return value(rng)
    at = rng.choice(list(inside))
    change = rng.random()
    if change < 0.1:
        del node[at]
    elif change < 0.3 and isinstance(node, dict):
        node[rng.choice([*keys, *WORDS, *KEYS])] = value(rng) if change < 0.2 else node[at]
    elif change < 0.5 and isinstance(node, dict):  # another name
        new = at.replace(rng.choice(PARTS), rng.choice(PARTS)) + rng.choice(["", "", "x", ".", ".weight", "\x1b"])
        node[new] = node.pop(at)
    else:
        node[at] = mutate_json(rng, node[at], keys)
    return node


def mutate_bytes(rng: random.Random, content: bytes, limit: int) -> bytes:
    """A few bytes changed, inserted or cut out within the first ``limit``."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(limit, len(damaged)) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            damaged[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            damaged[at:at] = rng.choice([b"0", b"-", b"9" * 30, b"[", b"{", b'"', b"\x00", b"\xff", b"\\ud800", b"e9"])
        elif kind == 2:
            del damaged[at : at + rng.choice([1, 2, 8, 50])]
        else:
            del damaged[at if rng.random() < 0.1 else len(damaged) :]
    return bytes(damaged)


def write(rng: random.Random, folder: Path, started: list[Any]) -> Path:
    """A damaged adapter in ``folder``; returns what to load."""
    tensors, config = rng.choice(started)
    content = save(tensors)
    header_size = struct.unpack("<Q", content[:8])[0]
    text = json.dumps(config).encode()
    state = b'{"epoch": 1.0, "global_step": 7}'
    target = rng.random()
    if config is None or target < 0.55:
        if rng.random() < 0.5:
            content = mutate_bytes(rng, content, 8 + header_size)
        else:
            header = json.loads(content[8 : 8 + header_size])
            data = content[8 + header_size :]
            for _ in range(rng.randint(1, 3)):
                header = mutate_json(rng, header, list(tensors))
            new = json.dumps(header).encode()
            content = struct.pack("<Q", len(new)) + new + data
    elif target < 0.95:
        if rng.random() < 0.3:
            text = mutate_bytes(rng, text, len(text))
        else:
            for _ in range(rng.randint(1, 3)):
                config = mutate_json(rng, json.loads(text), list(tensors))
                text = json.dumps(config).encode()
    else:
        state = json.dumps(mutate_json(rng, json.loads(state), [])).encode()
    for file in folder.iterdir():
        file.unlink()
    if config is None:
        (folder / "adapter.safetensors").write_bytes(content)
        return folder / "adapter.safetensors" if rng.random() < 0.5 else folder
    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "adapter_config.json").write_bytes(text)
    (folder / "trainer_state.json").write_bytes(state)
    return folder


def fuzz(count: int, root: Path, seed: int = 0) -> Counter[str]:
    """Outcomes of ``count`` damaged adapters. Raises AssertionError, with the seed, for any that must not be."""
    os.environ["MSPLORA_CACHE"] = ""
    folder = root / "checkpoint-7"
    folder.mkdir(exist_ok=True)
    started = seeds()
    outcomes: Counter[str] = Counter()
    for i in range(count):
        rng = random.Random(f"{seed}-{i}")
        path = write(rng, folder, started)
        before = sorted(p.name for p in folder.iterdir())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tables = load_tables(path, ignore_unknown=rng.random() < 0.5, workers=1)
            assert np.isfinite(tables.spectra["sigma"]).all(), f"seed {seed}-{i}: not finite"
            outcomes["tables"] += 1
        except AnalysisError as error:
            message = str(error)
            assert message.isprintable(), f"seed {seed}-{i}: {message!r}"
            assert str(root) in message, f"seed {seed}-{i}: {message}"
            assert len(message) < 2000, f"seed {seed}-{i}: {message}"
            outcomes["error"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}-{i}: {type(error).__name__}: {error}") from error
        assert sorted(p.name for p in folder.iterdir()) == before, f"seed {seed}-{i}: files changed"
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        outcomes = fuzz(args.count, Path(root), args.seed)
    print(f"{args.count} mutations: {dict(outcomes)} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
