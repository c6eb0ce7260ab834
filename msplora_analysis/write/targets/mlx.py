"""MLX-LM: adapters.safetensors with ``lora_a`` (in, r) and ``lora_b`` (r, out), and adapter_config.json.

Its ``load_adapters`` (mlx_lm/tuner/utils.py) makes LoRA layers of the modules in ``keys``, paths inside a block, in the
last ``num_layers`` blocks, and refuses tensors of any other module. A negative number means all blocks.
``scale`` is the whole factor of B A. It and the rank are one for all modules: lower ranks are filled up with zeros.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from msplora_analysis.errors import AnalysisError
from msplora_analysis.write.base_model import BaseModel
from msplora_analysis.write.source import Source
from msplora_analysis.write.targets.protocol import Target
from msplora_analysis.write.write import DTYPES, Array, Pair, save_tensors
from msplora_core.names import CONFIG

_FILE = "adapters.safetensors"
_BLOCK = re.compile(r"model\.layers\.[0-9]+\.(?P<key>.+)")  # as mlx-lm names them where transformers does, too


def write(folder: Path, pairs: Sequence[Pair], dtype: str, source: Source, base: BaseModel | None) -> Iterator[str]:
    tensors: dict[str, Array] = {}
    keys = set()
    rank = max(len(pair.a) for pair in pairs)
    for pair in pairs:
        name = pair.module.name
        if pair.module.is_embedding:
            raise AnalysisError(
                f"{name}: MLX-LM applies the update of an embedding to tied outputs too, and PEFT does not"
            )
        if pair.a.ndim != 2:
            raise AnalysisError(f"{name}: it is a convolution, of which MLX-LM has no LoRA")
        match = _BLOCK.fullmatch(name)
        if not match and name != "lm_head":
            raise AnalysisError(
                f"{name}: MLX-LM has no module of this name; expected model.layers.<number>... or lm_head"
            )
        keys.add(match["key"] if match else name)
        fill = (0, rank - len(pair.a))
        tensors[f"{name}.lora_a"] = np.pad(pair.a.T, ((0, 0), fill))
        tensors[f"{name}.lora_b"] = np.pad(pair.b.T, (fill, (0, 0)))
    save_tensors(tensors, dict.fromkeys(tensors, DTYPES[dtype]), folder / _FILE)
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    if model := source.config.get("base_model_name_or_path"):
        config["model"] = model
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if any(len(pair.a) < rank for pair in pairs):
        yield f"its ranks differ, and MLX-LM knows one: lower ones are filled up with zeros to {rank}"


TARGET = Target(
    what="an adapter of MLX-LM", files=(CONFIG, _FILE), write=write, dtypes=("bfloat16", "float16", "float32")
)
