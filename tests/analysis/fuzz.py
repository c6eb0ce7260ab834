"""Mutated files through every command: the only outcomes are success, or one line of error.

    python tests/analysis/fuzz.py --seed 0 --count 20000 --commands spectra,diagnose,results

Each mutation starts from a healthy run and spoils one file of a kind (see ``KINDS``): its bytes, or values in it by
others that are likely to hurt. It then goes through the commands given, in this process, as the command line would
call them. What was made, and what went wrong, can be made again from its seed.
"""

from __future__ import annotations

import argparse
import atexit
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from adapters import lora_config, lora_tensors
from safetensors.numpy import save

from msplora_analysis.errors import AnalysisError

SECONDS = 60  # of CPU time for one mutation in one command

NUMBERS = [0, 1, 2, 3, 4, 8, -1, 1.5, 1e300, float("nan"), float("inf"), 2**31, 2**53, 2**62, 2**63, 2**64, 10**250]
NUMBERS += [10**400]
WORDS = ["", "a", "F32", "F16", "BF16", "I64", "F4", "none", "all", "\n", "\0", "\x1b[1m", "NaN", "=1+1", "@x", "-1"]
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
WORDS += [
    "\u202egpj",
    "$x$",
    "$\\frac{",
    "[bold]",
    "[/bold]",
    "<script>",
    "{{x}}",
    "a|b",
    "`x`",
    "%s",
    "x" * 5000,
    "(a+)+b",
]
WORDS += [
    "cola",
    "lora",
    "msplora",
    "perplexity",
    "accuracy",
    "(.*)*x",
    "[a-z]{1,5}",
    "^layer.0.query$",
    "(?=a)",
    "\\1",
]
_TEXTS = [word for word in WORDS if word != "\ud800"]  # what can be written as it is
KEYS = ["r", "lora_alpha", "peft_type", "rank_pattern", "alpha_pattern", "ranks", "use_rslora", "bias", "use_dora"]
KEYS += ["modules_to_save", "target_modules", "mid_groups", "dtype", "shape", "data_offsets", "__metadata__", "alpha"]
KEYS += ["lora_bias", "trainable_token_indices", "rank", "module_dropout", "fan_in_fan_out", "layers_to_transform"]
KEYS += ["epoch", "step", "loss", "eval_loss", "log_history", "settings", "results", "metric", "task", "seed", "method"]
PARTS = ["lora_A", "lora_B", "lora_down", "lora_up", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1"]
PARTS += ["lokr_w2", "lokr_w1_a", "lokr_t2", "msplora_global.A", "msplora_layer.B", "lora_embedding_A", "oft_blocks"]
PARTS += ["lora_magnitude_vector", "alpha", "diff", "lora_E", "vera_lambda_b", "lora_a", "lora_b", "weight", "bias"]
BYTES = [b"0", b"-", b"9" * 30, b"[", b"{", b'"', b"\x00", b"\xff", b"\\ud800", b"e9", b"\x1b[1m", b"[" * 3000, b"="]


# --- values ---


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
        new = at.replace(rng.choice(PARTS), rng.choice(PARTS)) + rng.choice(["", "", "x", ".", ".weight", *WORDS[:16]])
        node[new] = node.pop(at)
    else:
        node[at] = mutate_json(rng, node[at], keys)
    return node


def mutate_bytes(rng: random.Random, content: bytes, limit: int | None = None) -> bytes:
    """A few bytes changed, inserted or cut out within the first ``limit``."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(limit or len(damaged), len(damaged)) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            damaged[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            damaged[at:at] = rng.choice(BYTES)
        elif kind == 2:
            del damaged[at : at + rng.choice([1, 2, 8, 50])]
        else:
            del damaged[at if rng.random() < 0.1 else len(damaged) :]
    return bytes(damaged)


def mutated_text(rng: random.Random, content: bytes, keys: list[str]) -> bytes:
    """JSON with other values, or with other bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    node = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        node = mutate_json(rng, node, keys)
    if rng.random() < 0.02:
        return b'{"a":' * rng.choice([60, 900, 20_000]) + b"1" + b"}" * rng.choice([60, 900, 20_000])
    return json.dumps(node).encode()


# --- what a mutation starts from ---


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


# --- kinds of mutations: each spoils a run, and says what is to be read ---

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
    old, new = rng.choice(["query", "layer", "0", "mlp", "attn"]), rng.choice(_TEXTS)
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


def spoil_torch(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A file of PyTorch, zip or older: its bytes, or the operations of its pickle."""
    import torch

    file = next((run / "checkpoint-7").glob("*.safetensors"))
    values: Any = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    if rng.random() < 0.3:
        values = {"state_dict": values, "epoch": 1, "optimizer": {"lr": [0.1, (2, "x")]}}
    zipped = rng.random() < 0.6
    buffer = io.BytesIO()
    torch.save(values, buffer, _use_new_zipfile_serialization=zipped)
    content = buffer.getvalue()
    if zipped and rng.random() < 0.7:
        content = _other_pickle(rng, content)
    else:
        content = mutate_bytes(rng, content, rng.choice([2000, None]))
    file.unlink()
    new = file.with_suffix(".bin" if file.stem == "adapter_model" else ".pt")
    new.write_bytes(content)
    return new


def spoil_parts(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A distributed checkpoint of PyTorch: its list of tensors, or their parts."""
    import torch
    import torch.distributed.checkpoint as dcp

    file = next((run / "checkpoint-7").glob("*.safetensors"))
    file.unlink()
    values = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": values, "step": 7}, checkpoint_id=file.parent, no_dist=True)
    spoiled = file.parent / rng.choice([".metadata", ".metadata", "__0_0.distcp"])
    spoiled.write_bytes(mutate_bytes(rng, spoiled.read_bytes(), rng.choice([2000, None])))
    return run


OPCODES = [bytes([code]) for code in range(256)]
OPERATIONS = [
    b"(",
    b")",
    b"]",
    b"}",
    b"u",
    b"s",
    b"e",
    b"a",
    b"R",
    b"b",
    b"Q",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"0",
    b"2",
]
OPERATIONS += [
    b"K\x02",
    b"J\xff\xff\xff\x7f",
    b"M\xff\xff",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"N",
    b"\x88",
    b"\x81",
    b".",
]
OPERATIONS += [
    b"q\x00",
    b"h\x00",
    b"h\x01",
    b"h\x05",
    b"r\xff\xff\xff\xff",
    b"j\x00\x00\x00\x00",
    b"X\x01\x00\x00\x00a",
]
OPERATIONS += [b"cos\nsystem\n", b"ctorch\nTensor\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"]
OPERATIONS += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"cbuiltins\nset\n"]
OPERATIONS += [
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"X\xff\xff\xff\x7f",
    b"B\xff\xff\xff\x7f",
    b"\x95" + b"\xff" * 8,
]


def _other_pickle(rng: random.Random, content: bytes) -> bytes:
    """A zip archive of PyTorch with other operations in its pickle, or other entries."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {item.filename: archive.read(item) for item in archive.infolist()}
    name = next(one for one in entries if one.endswith("data.pkl"))
    if rng.random() < 0.8:
        pickled = bytearray(entries[name])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(pickled) + 1)
            kind = rng.random()
            operation = rng.choice(OPERATIONS if rng.random() < 0.7 else OPCODES)
            if kind < 0.4:
                pickled[at:at] = operation
            elif kind < 0.8:
                pickled[at : at + len(operation)] = operation
            else:
                del pickled[at : at + rng.choice([1, 2, 8])]
        entries[name] = bytes(pickled)
    else:
        old = rng.choice(list(entries))
        new = rng.choice(
            [old.upper(), old.replace("data", "DATA"), "../" + old, old + "x", "x/data.pkl", "\x1b[1m", old]
        )
        entries[new] = entries.pop(old) if rng.random() < 0.5 else rng.choice(list(entries.values()))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED) as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
    return made.getvalue() if rng.random() < 0.8 else mutate_bytes(rng, made.getvalue())


def spoil_index(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The index of a whole model in parts, which is read with itself as its base."""
    folder = run / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(save({"x.weight": np.ones((3, 4), np.float32)}))
    index = {"metadata": {"total_size": 48}, "weight_map": {"x.weight": "a.safetensors"}}
    text = mutated_text(rng, json.dumps(index).encode(), ["x.weight"])
    (folder / "model.safetensors.index.json").write_bytes(text)
    return folder


def spoil_table(suffix: str) -> Spoiler:
    """A table of spectra."""

    def spoil(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
        file = run / f"spectra{suffix}"
        file.write_bytes(_spoilt_table(rng, _table(), suffix))
        return file

    return spoil


def spoil_ablation(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The table of an ablation, or what stands beside it."""
    suffix = rng.choice([".csv", ".csv", ".parquet"])
    about = json.dumps({"run": "cola", "step": 7, "task": "cola", "metric": "matthews_correlation"}).encode()
    if rng.random() < 0.3:
        about = mutated_text(rng, about, ["weights_sha256", "greater_is_better"])
    (run / "checkpoint-7" / "ablation.json").write_bytes(about)
    (run / "checkpoint-7" / f"ablation{suffix}").write_bytes(_spoilt_table(rng, _ablation(), suffix))
    return run


@cache
def _ablation() -> Any:
    from figure_cases import ablation_of

    return ablation_of(2).drop(columns=["run", "step", "task", "metric_name"])


def _spoilt_table(rng: random.Random, table: Any, suffix: str) -> bytes:
    """A table as a file, with other bytes, cells or columns."""
    import pandas as pd

    table = table.copy()
    if rng.random() < 0.7:
        for _ in range(rng.randint(1, 3)):
            column = rng.choice(list(table))
            change = rng.random()
            if change < 0.1:
                table = table.drop(columns=column)
            elif change < 0.2:
                table = pd.concat([table, table.tail(rng.randint(1, 3))])
            elif change < 0.3:
                table = table.head(rng.randrange(4))
            else:
                cells = list(table[column].astype(object))
                for _ in range(rng.randint(1, 3)):
                    if cells:
                        cells[rng.randrange(len(cells))] = rng.choice([*NUMBERS, *_TEXTS, None])
                table = table.assign(**{column: pd.Series(cells, table.index, dtype=object)})
            if not len(table.columns):
                break
    try:
        content = table.to_csv(index=False).encode() if suffix == ".csv" else table.to_parquet(index=False)
    except Exception:  # pandas does not write what cannot be written
        content = table.map(str).to_csv(index=False).encode()
    return mutate_bytes(rng, content) if rng.random() < 0.4 else content


@cache
def _table() -> Any:
    from msplora_analysis import load_spectra

    with tempfile.TemporaryDirectory() as root:
        return load_spectra(write_run(Path(root) / "run", *SEEDS[1]), cache=False)


def spoil_moments(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The moments beside an adapter of PEFT: header, bytes, values, or what the header says of them."""
    write_run(run, *SEEDS[0])
    header, values = _moments()
    kind = rng.randrange(4)
    if kind == 0:
        about = mutated_text(rng, header["__metadata__"]["msplora_moments"].encode(), ["scales", "ranks", "examples"])
        header = {**header, "__metadata__": {"msplora_moments": about.decode(errors="ignore")}}
    elif kind == 1:
        for _ in range(rng.randint(1, 3)):
            header = mutate_json(rng, json.loads(json.dumps(header)), list(_moments()[0]))
    elif kind == 2:
        array = np.frombuffer(values, "<f4").copy()
        array[rng.randrange(len(array)) :][: rng.randint(1, 20)] = rng.choice([np.nan, np.inf, -1, 0, 3e38, 1e-40])
        values = array.tobytes()
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + values
    if kind == 3:
        content = mutate_bytes(rng, content, rng.choice([len(text), None]))
    (run / "checkpoint-7" / "moments.safetensors").write_bytes(content)
    return run


@cache
def _moments() -> tuple[dict[str, Any], bytes]:
    from moment_cases import lora_factors, random_tokens, write_moments

    factors = lora_factors(SEEDS[0][0])
    shapes = {name: (len(of["layer"][1]), of["layer"][0].shape[1]) for name, of in factors.items()}
    tokens = {name: random_tokens(*shape, examples=4) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as root:
        content = write_moments(Path(root), factors, tokens).read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def spoil_measured(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """What an ablation that was stopped has left, and goes on from."""
    buffer = io.BytesIO()
    about = mutated_text(rng, json.dumps({**MEASUREMENT, "data": {"source": None}}).encode(), [])
    text = about.decode(errors="ignore") if rng.random() < 0.5 else json.dumps({**MEASUREMENT, "bootstrap": None})
    arrays = {f"{name}/0": np.zeros(2) for name in ("kl", "metric", "loss", "predictions", rng.choice(_TEXTS) or "x")}
    np.savez(buffer, about=np.array(text), **arrays)
    content = buffer.getvalue()
    (run / "ablation.npz").write_bytes(mutate_bytes(rng, content) if rng.random() < 0.6 else content)
    return run


MEASUREMENT = {"data": {"source": None}, "run": None, "step": None, "seed": 0}


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
YAML_WORDS = [
    "&a [*a]",
    "*a",
    "!!python/object/apply:os.system [x]",
    "{",
    "[" * 3000,
    "- " * 3000,
    "&a {<<: *a}",
    "? x",
]
YAML_WORDS += [
    "|",
    ">",
    "1e400",
    "0x10",
    "1:30",
    ".inf",
    ".nan",
    "yes",
    "2026-01-01",
    "9" * 400,
    "0",
    "-1",
    "~",
    "\t",
    "---",
]


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
                new = rng.choice([*YAML_WORDS, *_TEXTS, str(rng.choice(NUMBERS[:-2])), value])
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


def spoil_links(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Links that lead in a circle, deep folders, and files of other kinds where one is expected."""
    for _ in range(rng.randint(1, 3)):
        at = rng.choice([run, run / "checkpoint-7", run.parent])
        name = rng.choice(
            ["a", "checkpoint-8", "run.json", "adapter_config.json", "=x", "\x1b[1m", "é", "a\udcff", "$x$"]
        )
        kind = rng.randrange(5)
        try:
            if kind == 0:
                (at / name).symlink_to(
                    rng.choice([".", "..", "/dev/zero", "nowhere", name, "checkpoint-7", "run.json"])
                )
            elif kind == 1:
                (at / Path(*["d"] * rng.choice([3, 100]))).mkdir(parents=True)
            elif kind == 2:
                os.mkfifo(at / name)
            elif kind == 3:
                shutil.copytree(run / "checkpoint-7", at / name, symlinks=True)  # /dev/zero has no end
            else:
                (run / "checkpoint-7").rename(run / f"checkpoint-{rng.choice(['x', '9' * 20, '0', name])}")
        except (OSError, RecursionError):
            continue
    return run


def spoil_rows(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The rows to train on."""
    rows = [{"sentence": f"a {i}", "label": i % 2} for i in range(4)]
    lines = [json.dumps(row).encode() for row in rows]
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines))
        try:
            lines[at] = mutated_text(rng, lines[at], ["sentence", "label"])
        except (ValueError, RecursionError):  # what was mutated before is no JSON any more
            lines[at] = mutate_bytes(rng, lines[at])
    (run / "cola_train.jsonl").write_bytes(b"\n".join(lines))
    (run / "cola_validation.jsonl").write_bytes(b"\n".join(lines))
    return run


KINDS: dict[str, Spoiler] = {
    "header": spoil_header,
    "names": spoil_name,
    "values": spoil_values,
    "config": spoil_json("adapter_config.json"),
    "state": spoil_json("trainer_state.json"),
    "record": spoil_json("run.json"),
    "torch": spoil_torch,
    "parts": spoil_parts,
    "index": spoil_index,
    "parquet": spoil_table(".parquet"),
    "csv": spoil_table(".csv"),
    "links": spoil_links,
    "rows": spoil_rows,
    "moments": spoil_moments,
    "ablation": spoil_ablation,
    "measured": spoil_measured,
    "gguf": spoil_gguf,
    "mlx": spoil_mlx,
    "yaml": spoil_yaml,
    "cache": spoil_name,  # the cache is spoiled between two calls
}


# --- commands ---


def _command(*words: str) -> Callable[[Path, Path, random.Random], None]:
    def call(path: Path, out: Path, rng: random.Random) -> None:
        _command_line().main([word.format(path=path, out=out, other=_other()) for word in words], standalone_mode=False)

    return call


@cache
def _other() -> Path:
    """A healthy run, to be related to."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_run(Path(folder) / "other", *SEEDS[0])


@cache
def _command_line() -> Any:
    import typer

    from msplora_analysis.cli import app

    return typer.main.get_command(app)  # typer makes it anew with every call of the app


def _measured(path: Path, out: Path, rng: random.Random) -> None:
    """What ``msplora-measure`` reads of an earlier measurement, and of moments."""
    from msplora_core.measure.ablation_folder import _known
    from msplora_core.moments import read_moments

    run = path if path.is_dir() else path.parent
    _known(run / "ablation.npz", MEASUREMENT, 2, str)
    for file in run.rglob("moments.safetensors"):
        read_moments(file, scores=("plain", "task"))


def _resume(path: Path, out: Path, rng: random.Random) -> None:
    """What ``--resume`` reads before it trains."""
    from msplora_core.run import checkpoints, record

    run = path if path.is_dir() else path.parent
    if (run / "run.json").is_file():
        record.read(run)
    checkpoints.newest_whole(run)


def _load_rows(path: Path, out: Path, rng: random.Random) -> None:
    from msplora_core.data.loading import load_splits
    from msplora_core.data.tasks import get_task

    load_splits(get_task("cola"), path if path.is_dir() else path.parent)["train"].fingerprint  # noqa: B018


def _load(path: Path, out: Path, rng: random.Random) -> None:
    from msplora_analysis import load_tables

    tables = load_tables(path, ignore_unknown=rng.random() < 0.5, cache=bool(os.environ["MSPLORA_CACHE"]))
    assert np.isfinite(tables.spectra["sigma"]).all(), "not finite"


COMMANDS: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "load": _load,
    "spectra": _command("spectra", "{path}", "--out", "{out}", "--format", "csv", "--workers", "1", "--ignore-unknown"),
    "diagnose": _command("diagnose", "{path}", "--workers", "1", "--json"),
    "redundancy": _command("redundancy", "{path}", "--out", "{out}", "--workers", "1", "--details"),
    "results": _command("results", "{path}", "--out", "{out}"),
    "watch": _command("watch", "{path}", "--once", "--no-cache"),
    "export": _command("export", "{path}", "--out", "{out}/adapter"),
    "compress": _command("compress", "{path}", "--out", "{out}/small", "--rank", "1"),
    "compress moments": _command(
        "compress", "{path}/checkpoint-7", "--out", "{out}/small", "--kl", "0.5", "--weights", "moments"
    ),
    "export mlx": _command("export", "{path}", "--out", "{out}/adapter", "--to", "mlx"),
    "advise": _command("advise", "{path}", "--out", "{out}"),
    "check": _command("check", "{path}"),
    "share": _command("share", "{path}", "--out", "{out}/shared"),
    "relate": _command("relate", "{path}", "{other}", "--out", "{out}"),
    "measure": _measured,
    "report": _command("report", "{path}", "--out", "{out}/report.html", "--workers", "1"),
    "compare": _command("compare", "{path}", "--with", "{path}", "--out", "{out}"),
    "figures": _command("figures", "{path}", "--out", "{out}", "--workers", "1", "--format", "svg"),
    "base": _command("spectra", "{path}", "--base", "{path}", "--out", "{out}", "--workers", "1"),
    "resume": _resume,
    "rows": _load_rows,
}
SHARES = {
    "load": 20,
    "resume": 40,
    "rows": 100,
    "measure": 60,
    "export": 15,
    "compress": 10,
    "check": 15,
    "results": 10,
}
"""How often a command is chosen; 3 of those that are not here. About the inverse of its time."""
SLOW = {"report": 0.1, "figures": 0.1, "compare": 0.3, "diagnose": 1, "watch": 1, "advise": 1, "relate": 1}
OFTEN = ("load", "spectra", "redundancy", "results", "export", "export mlx", "compress", "check", "share", "resume")
ALL = (*OFTEN, *SLOW)
TABLES = ("diagnose", "report", "compare", "figures")
WEIGHED = ("load", "spectra", "redundancy", "advise", "compress moments", "measure", "report")
FOR = {
    "rows": ("rows",), "index": ("base",), "cache": ("load", "spectra"), "parquet": TABLES, "csv": TABLES,
    "measured": ("measure",), "moments": WEIGHED, "ablation": ("advise", "figures", "report"),
}  # fmt: skip


def _share(command: str) -> float:
    return SLOW.get(command, SHARES.get(command, 3))


@contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU time, which other programs do not stretch
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@cache
def _pairs(kinds: tuple[str, ...], commands: tuple[str, ...]) -> dict[tuple[str, str], float]:
    """What is chosen from, with shares: of the kinds by what their commands cost, within a kind likewise."""
    return {(kind, name): _share(name) for kind in kinds for name in commands if name in FOR.get(kind, ALL)}


def run_one(rng: random.Random, root: Path, kinds: list[str], commands: list[str]) -> tuple[str, str, str]:
    """One mutation in one command: its kind, the command, and the outcome. Raises whatever must not be."""
    from msplora_core.errors import TrainingError

    pairs = _pairs(tuple(kinds), tuple(commands))
    kind, command = rng.choices(list(pairs), list(pairs.values()))[0]
    tensors, config = rng.choice(SEEDS)
    run, out = root / "runs" / "run", root / "out"
    shutil.rmtree(root / "runs", ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    path = KINDS[kind](rng, write_run(run, tensors, config), tensors)
    if kind == "cache":
        _spoil_cache(rng, root, path)
    before = sorted(map(str, (root / "runs").rglob("*")))
    shown, told = io.StringIO(), io.StringIO()
    outcome = "done"
    try:
        with warnings.catch_warnings(), redirect_stdout(shown), redirect_stderr(told), _deadline(SECONDS):
            warnings.simplefilter("ignore")
            COMMANDS[command](path, out, rng)
    except (AnalysisError, TrainingError) as error:
        outcome, message = "error", str(error)
        assert message.isprintable(), repr(message)
        assert len(message) < 2000, message
    except TimeoutError:
        raise
    except (OSError, SystemExit):  # the command line makes one line of an OSError
        outcome = "error"
    for text in (shown.getvalue(), told.getvalue()):
        assert all(letter.isprintable() or letter == "\n" for letter in text), repr(text)
    for file in out.rglob("*.csv"):
        for line in file.read_text().splitlines():
            assert not any(cell.lstrip('"').startswith(("=", "@")) for cell in line.split(",")), line
    assert sorted(map(str, (root / "runs").rglob("*"))) == before, "files changed"
    return kind, command, outcome


def _spoil_cache(rng: random.Random, root: Path, path: Path) -> None:
    """Fill the cache, and put other rows into it."""
    import sqlite3
    import zlib

    from msplora_analysis import load_tables

    cache = root / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["MSPLORA_CACHE"] = str(cache)
    for file in path.rglob("*"):
        os.utime(file, (1e9, 1e9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_tables(path, ignore_unknown=True)
        except AnalysisError:
            return
    for file in cache.glob("*.sqlite"):
        if rng.random() < 0.2:
            file.write_bytes(mutate_bytes(rng, file.read_bytes()))
            continue
        with sqlite3.connect(file) as database:
            for key, rows, sigma in database.execute("SELECT key, rows, sigma FROM spectra").fetchall():
                text = mutated_text(rng, zlib.decompress(rows), [])
                new = zlib.compress(text) if rng.random() < 0.9 else mutate_bytes(rng, rows)
                values = sigma if rng.random() < 0.7 else mutate_bytes(rng, sigma)
                database.execute("UPDATE spectra SET rows = ?, sigma = ? WHERE key = ?", (new, values, key))


def fuzz(
    count: int, root: Path, seed: int = 0, kinds: list[str] | None = None, commands: list[str] | None = None
) -> Counter[tuple[str, str, str]]:
    """Outcomes of ``count`` mutations, by kind and command.

    Raises AssertionError, with the seed, for any that must not be.
    """
    chosen = commands or [*OFTEN, "rows", "base", "measure", "advise", "diagnose", "watch"]
    possible = [k for k in kinds or KINDS if set(FOR.get(k, ALL)) & set(chosen)]
    outcomes: Counter[tuple[str, str, str]] = Counter()
    for i in range(count):
        os.environ["MSPLORA_CACHE"] = ""
        try:
            outcomes[run_one(random.Random(f"{seed}-{i}"), root, possible, chosen)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}-{i}: {type(error).__name__}: {error}") from error
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--commands", default=",".join(COMMANDS), help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these")
    parser.add_argument("--keep-going", action="store_true", help="count what must not be, and go on")
    args = parser.parse_args()
    kinds, commands = args.kinds.split(","), args.commands.split(",")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))  # no mutation fills the disk
    start, done, faults = time.perf_counter(), Counter[tuple[str, str, str]](), Counter[str]()
    possible = [k for k in kinds if set(FOR.get(k, ALL)) & set(commands)]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as root:
        for i in range(args.first, args.first + args.count):
            if time.perf_counter() - start > args.seconds:
                break
            os.environ["MSPLORA_CACHE"] = ""
            try:
                done[run_one(random.Random(f"{args.seed}-{i}"), Path(root), possible, commands)] += 1
            except Exception as error:
                if not args.keep_going:
                    print(f"seed {args.seed}-{i}", file=sys.stderr)
                    raise
                import traceback

                at = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {str(error)[:100]!r}"
                if not faults[text]:
                    print(f"seed {args.seed}-{i}: {text}", file=sys.stderr, flush=True)
                faults[text] += 1
    seconds = time.perf_counter() - start
    for name, place in (("kind", 0), ("command", 1), ("outcome", 2)):
        counted: Counter[str] = Counter()
        for key, number in done.items():
            counted[key[place]] += number
        print(f"{name}: {dict(counted)}")
    took = f"{seconds:.0f} s, {time.process_time():.0f} s of them computing"
    print(f"{done.total()} mutations without fault, {faults.total()} with, in {took}")


if __name__ == "__main__":
    main()
