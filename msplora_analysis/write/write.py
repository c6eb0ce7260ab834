"""Write low-rank pairs as a folder that PEFT, and what reads its LoRA, loads."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, StrPath
from msplora_analysis.formats.names import PREFIX
from msplora_analysis.tables.files import write_table
from msplora_analysis.write.parts import join
from msplora_analysis.write.source import Module, Source
from msplora_core.atomic import replacing_folder
from msplora_core.names import CONFIG

if TYPE_CHECKING:
    import pandas as pd

WEIGHTS_NAME, TABLE_NAME = "adapter_model.safetensors", "ranks.csv"
# Names of types in safetensors files, from the least to the most exact.
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}

Array = NDArray[Any]


class Pair(NamedTuple):
    """``b @ a`` is the whole update of a module: nothing is left to scale.

    Attributes:
        module: What they adapt.
        a: (r, in, ...), as many axes as the module's weight.
        b: (out, r, 1, ...), likewise.
    """

    module: Module
    a: Array
    b: Array


@contextmanager
def new_folder(out: StrPath, source: Place, overwrite: bool, files: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``out`` at the end, or disappears with an exception.

    ``files``: names by which an adapter in ``out`` is known, besides those of PEFT's.

    Raises:
        AnalysisError: ``out`` holds anything and must not be overwritten, holds more than an adapter, is the folder of
            the ``source`` itself, or cannot be written.
    """
    out = Path(os.path.abspath(out))
    try:
        _check_free(out, source, overwrite, {CONFIG, WEIGHTS_NAME, TABLE_NAME, "README.md", *files})
        with replacing_folder(out) as beside:
            yield beside
    except OSError as error:
        raise AnalysisError(f"out={out}: cannot be written: {error.strerror or error}", "out") from None


def _check_free(out: Path, source: Place, overwrite: bool, own: set[str]) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise AnalysisError(f"out={out}: not a folder; give another path", "out")
    names = {path.name for path in out.iterdir()}
    if isinstance(source, Path) and os.path.realpath(out) == os.path.realpath(source.parent):
        raise AnalysisError(f"out={out}: it is the folder of the adapter itself; give another path", "out")
    if names and not overwrite:
        message = f"out={out}: the folder is not empty; give another, or overwrite=True to replace an adapter"
        raise AnalysisError(message, "out", "overwrite")
    if others := sorted(names - own):
        raise AnalysisError(f"out={out}: it holds {others[0]}, which is not of an adapter; give another path", "out")


def check_dtype(dtype: str | None) -> None:
    """Raises AnalysisError for a type that is not written."""
    if dtype is not None and dtype not in DTYPES:
        raise AnalysisError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}", "dtype")


def as_pair(module: Module, a: Array, b: Array, dtype: str) -> Pair:
    """A (r, cols) and B (rows, r) with the axes that PEFT gives them, rounded to ``dtype``."""
    rank, ones = len(a), (1,) * (len(module.inputs) - 1)
    a, b = a.reshape(rank, *module.inputs), b.reshape(len(b), rank, *ones)
    return Pair(module, rounded(a, dtype), rounded(b, dtype))


def finish(folder: Path, table: pd.DataFrame) -> None:
    """Write ranks.csv, and let everybody read what may read it: safetensors makes files for their owner alone."""
    write_table(table, folder / TABLE_NAME)
    for path in folder.iterdir():
        os.chmod(path, (folder / TABLE_NAME).stat().st_mode)


def write_peft(folder: Path, pairs: Iterable[Pair], dtype: str, source: Source) -> None:
    """Write adapter_config.json and adapter_model.safetensors; one pair is held at a time.

    Args:
        folder: Where to.
        pairs: What is adapted.
        dtype: Of the factors, a key of DTYPES; the pairs have it already, or float32 where numpy has none.
        source: What else is copied, and what the config says of the base model.
    """
    ranks: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=folder) as parts:
        for pair in pairs:
            part, suffix = ("lora_embedding_", "") if pair.module.is_embedding else ("lora_", ".weight")
            keys = [f"{PREFIX}{pair.module.name}.{part}{factor}{suffix}" for factor in "AB"]
            file = Path(parts) / f"{len(ranks):06d}.safetensors"
            save_tensors(dict(zip(keys, (pair.a, pair.b), strict=True)), dict.fromkeys(keys, DTYPES[dtype]), file)
            ranks[pair.module.name] = len(pair.a)
        config = peft_config(ranks, source.config)
        dropped = {module.name for module in source.modules}.difference(config["target_modules"])
        for i, (key, tensor) in enumerate(source.copied.items()):
            if key.removeprefix(PREFIX).partition(".base_layer.")[0] in dropped:  # PEFT wraps it no more
                key = key.replace(".base_layer.", ".", 1)
            file = Path(parts) / f"copied-{i:06d}.safetensors"
            save_tensors({key: source.file.read(tensor)}, {key: source.stored.get(tensor, "")}, file)
        join(sorted(Path(parts).iterdir()), folder / WEIGHTS_NAME)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def widest_dtype(source: Source) -> str:
    """The most exact type among the factors in the file; of 8-bit floats bfloat16, which holds them."""
    products = [product for module in source.modules for product in module.update.products]
    tensors = {tensor for product in products for factor in (product.a, product.b) for tensor in factor.tensors}
    kinds = {source.stored.get(name) or f"F{8 * source.file.read(name).itemsize}" for name in tensors}
    return next((name for name, kind in reversed(DTYPES.items()) if kind in kinds), "bfloat16")


def rounded(values: NDArray[np.floating[Any]], dtype: str) -> Array:
    """``values`` at the precision of ``dtype``; bfloat16 in float32, as numpy has no such type.

    Raises:
        AnalysisError: A value is beyond the largest of the type.
    """
    if dtype == "bfloat16":
        import torch

        result: Array = torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()
    else:
        with np.errstate(over="ignore"):
            result = values.astype(dtype)
    if not np.isfinite(result).all():
        raise AnalysisError(f"values up to {np.abs(values).max():.3g} exceed {dtype}; give dtype=float32", "dtype")
    return result


def save_tensors(
    tensors: dict[str, Array], kinds: Mapping[str, str], path: Path, metadata: Mapping[str, str] = {}
) -> None:
    """A safetensors file. kinds: the type of each tensor ("BF16", held as float32); others are written as they are."""
    about = {"format": "pt", **metadata}
    # safetensors writes the memory of an array as it lies.
    tensors = {key: np.ascontiguousarray(values) for key, values in tensors.items()}
    if "BF16" not in kinds.values():
        from safetensors.numpy import save_file

        save_file(tensors, path, about)
        return
    import torch
    from safetensors.torch import save_file as save_torch_file

    as_torch = {key: torch.from_numpy(values) for key, values in tensors.items()}
    exact = {key: one.bfloat16() if kinds.get(key) == "BF16" else one for key, one in as_torch.items()}
    save_torch_file(exact, path, about)


def peft_config(ranks: Mapping[str, int], kept: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA whose factors are the whole update: alpha = r for every module.

    PEFT's alpha / r is then 1, also for readers that know one r and alpha only. ranks: of each module. kept: what else
    it says, of the base model and of what is trained in full.
    """
    rank = max(ranks.values())
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        **kept,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "use_dora": False,
    }
