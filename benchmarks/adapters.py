"""The adapters that are measured: synthetic, as PEFT writes them, with the shapes of real models.

A is what PEFT starts from (Kaiming uniform, a = sqrt 5); B = G C, with G Gaussian and C a random
rank x rank matrix whose singular values fall evenly in logarithm from 1 to 1/decay: 1/100 is about
what trained adapters show; HARD goes far below, to see who is still exact there. The values depend on
nothing but the case and the epoch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
WEIGHTS, CONFIG, STATE = "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"
_SCALE = 0.02  # of B


@dataclass(frozen=True)
class Linear:
    """An adapted linear layer: the end of its module's path, and the shape of its weight."""

    path: str
    rows: int
    cols: int

    @property
    def module(self) -> str:
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Case:
    """A training whose checkpoints are measured (``epochs`` 0: one adapter, outside any checkpoint)."""

    name: str
    title: str
    stack: str  # path of the numbered layers
    layers: int
    linears: tuple[Linear, ...]
    rank: int
    dtype: str
    epochs: int = 0
    decay: float = 1e2

    @property
    def files(self) -> int:
        return max(1, self.epochs)

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}"

    @property
    def matrices(self) -> int:
        """Number of weight updates in all its files."""
        return self.files * self.layers * len(self.linears)

    @property
    def nbytes(self) -> int:
        per_layer = sum(linear.rows + linear.cols for linear in self.linears) * self.rank * DTYPES[self.dtype][1]
        return self.files * self.layers * per_layer

    def part(self, *, layers: int | None = None, epochs: int | None = None, modules: tuple[str, ...] = ()) -> Case:
        """The same training with fewer layers, checkpoints or adapted modules."""
        linears = tuple(linear for linear in self.linears if not modules or linear.module in modules)
        return replace(
            self,
            layers=self.layers if layers is None else layers,
            epochs=self.epochs if epochs is None else epochs,
            linears=linears,
        )


def _attention(hidden: int, kv: int) -> tuple[Linear, ...]:
    rows = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
    return tuple(Linear(f"self_attn.{module}", size, hidden) for module, size in rows.items())


def _mlp(hidden: int, intermediate: int) -> tuple[Linear, ...]:
    return (
        Linear("mlp.gate_proj", intermediate, hidden),
        Linear("mlp.up_proj", intermediate, hidden),
        Linear("mlp.down_proj", hidden, intermediate),
    )


def _cases(dtype: str) -> tuple[Case, ...]:
    roberta, llama = "roberta.encoder.layer", "model.layers"
    query_value = tuple(Linear(f"attention.self.{module}", 768, 768) for module in ("query", "value"))
    small, large = _attention(4096, 4096), _attention(8192, 1024)
    seven = "all seven linears"
    return (
        Case("S", "RoBERTa-base q,v r 8 × 80 epochs", roberta, 12, query_value, 8, dtype, epochs=80),
        Case("M", "LLaMA-2-7B q,v r 64", llama, 32, (small[0], small[2]), 64, dtype),
        Case("L", f"LLaMA-2-7B {seven} r 64", llama, 32, small + _mlp(4096, 11008), 64, dtype),
        Case("XL", f"LLaMA-2-70B {seven} r 16", llama, 80, large + _mlp(8192, 28672), 16, dtype),
    )


CASES = {case.label: case for dtype in DTYPES for case in _cases(dtype)}
HARD = replace(
    CASES["S float32"], name="hard", title="RoBERTa-base q,v r 8, sigma_8 near 1e-5 sigma_1", epochs=0, decay=3e4
)


def make(case: Case, root: Path) -> Path:
    """The folder of ``case`` under ``root``, written unless it is there already."""
    parts = "-".join(linear.module for linear in case.linears)
    folder = root / f"{case.name}-{case.dtype}-{case.files}x{case.layers}-{crc32(parts.encode()):08x}"
    if shutil.disk_usage(_existing(root)).free < 2 * case.nbytes:
        raise SystemExit(f"error: {root}: less than {2 * case.nbytes / 1e9:.1f} GB free; give another --data folder")
    for epoch in range(1, case.files + 1):
        step = 268 * epoch  # CoLA in batches of 32
        target = folder / f"checkpoint-{step}" if case.epochs else folder
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG).write_text(json.dumps(_config(case), indent=2))
        if case.epochs:
            (target / STATE).write_text(json.dumps({"epoch": float(epoch), "global_step": step}))
        _write(target / WEIGHTS, case, seed=epoch)
    return folder


def files(folder: Path) -> list[Path]:
    """The adapter files of a case's folder, in the order of their epochs."""
    return sorted(folder.rglob(WEIGHTS), key=lambda file: (len(file.parent.name), file))


def factors(file: Path) -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """Each module's name with its A and B as they stand in ``file``, in float64: for the reference spectra."""
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header.pop("__metadata__", None)

        def tensor(key: str) -> NDArray[np.float64]:
            entry = header[key]
            begin, end = entry["data_offsets"]
            stream.seek(8 + size + begin)
            raw = stream.read(end - begin)
            if entry["dtype"] == "BF16":  # the upper half of a float32
                values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
            else:
                values = np.frombuffer(raw, "<f4")
            return values.reshape(entry["shape"]).astype(np.float64)

        for key in header:
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                yield name.removeprefix("base_model.model."), tensor(key), tensor(f"{name}.lora_B.weight")


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)


def _config(case: Case) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": case.rank,
        "lora_alpha": 2 * case.rank,
        "target_modules": [linear.module for linear in case.linears],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def _tensors(case: Case) -> dict[str, tuple[int, int]]:
    """Names and shapes in the order of the file: by name, as the safetensors library sorts them."""
    shapes = {}
    for layer in range(case.layers):
        for linear in case.linears:
            name = f"base_model.model.{case.stack}.{layer}.{linear.path}"
            shapes[f"{name}.lora_A.weight"] = (case.rank, linear.cols)
            shapes[f"{name}.lora_B.weight"] = (linear.rows, case.rank)
    return dict(sorted(shapes.items()))


def _header(case: Case) -> bytes:
    code, width = DTYPES[case.dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in _tensors(case).items():
        end = position + shape[0] * shape[1] * width
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: Path, case: Case, seed: int) -> None:
    header = _header(case)
    if file.is_file() and file.stat().st_size == len(header) + case.nbytes // case.files:
        with open(file, "rb") as stream:
            if stream.read(len(header)) == header:
                return
    rng = np.random.default_rng([seed, *case.label.encode()])
    beside = file.with_suffix(".tmp")
    with open(beside, "wb") as stream:
        stream.write(header)
        for name, shape in _tensors(case).items():
            values = _random_a(rng, shape) if ".lora_A." in name else _random_b(rng, shape, case.decay)
            stream.write(_encode(values, case.dtype))
    os.replace(beside, file)


def _random_a(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    return ((2 * rng.random(shape, dtype=np.float32) - 1) / np.float32(np.sqrt(shape[1]))).astype(np.float32)


def _random_b(rng: np.random.Generator, shape: tuple[int, int], decay: float) -> NDArray[np.float32]:
    rank = shape[1]
    left, right = (np.linalg.qr(rng.standard_normal((rank, rank)))[0] for _ in range(2))
    mix = (left * np.geomspace(1, 1 / decay, rank)) @ right
    mixed: NDArray[np.float32] = rng.standard_normal(shape, dtype=np.float32) @ (_SCALE * mix).astype(np.float32)
    return mixed


def _encode(values: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "float32":
        return values.astype("<f4").tobytes()
    bits = values.astype("<f4").view("<u4")
    bits += 0x7FFF + ((bits >> 16) & 1)  # to the nearest, ties to even
    return (bits >> 16).astype("<u2").tobytes()
