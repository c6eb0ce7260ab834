"""Tables, and what measurements leave."""

from __future__ import annotations

import io
import json
import random
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.healthy import SEEDS, write_run
from fuzz.values import NUMBERS, TEXTS, mutate_bytes, mutate_json, mutated_text
from fuzz.weights import Spoiler


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
                        cells[rng.randrange(len(cells))] = rng.choice([*NUMBERS, *TEXTS, None])
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
    arrays = {f"{name}/0": np.zeros(2) for name in ("kl", "metric", "loss", "predictions", rng.choice(TEXTS) or "x")}
    np.savez(buffer, about=np.array(text), **arrays)
    content = buffer.getvalue()
    (run / "ablation.npz").write_bytes(mutate_bytes(rng, content) if rng.random() < 0.6 else content)
    return run


MEASUREMENT = {"data": {"source": None}, "run": None, "step": None, "seed": 0}
