"""kohya's sd-scripts, ComfyUI and others: ``lora_unet_<path>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``.

The dots of a path become underscores. alpha is the rank, so that alpha / r is 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from msplora_analysis.errors import AnalysisError
from msplora_analysis.write.base_model import BaseModel, placed
from msplora_analysis.write.source import Source
from msplora_analysis.write.targets.protocol import Target
from msplora_analysis.write.write import DTYPES, Array, Pair, save_tensors

_FILE = "lora.safetensors"
# Transformers stand where the U-Net once stood. Pipelines with several text encoders number them.
_MODELS = {
    "unet": "unet",
    "transformer": "unet",
    "text_encoder": "te",
    "text_encoder_2": "te2",
    "text_encoder_3": "te3",
}


def write(folder: Path, pairs: Sequence[Pair], dtype: str, source: Source, base: BaseModel | None) -> Iterator[str]:
    tensors: dict[str, Array] = {}
    names = placed((pair.module.name for pair in pairs), base)
    parts = {name.partition(".")[0] for name in names.values()} | (base.names.keys() if base else set())
    flattened: dict[str, str] = {}
    for pair in pairs:
        if pair.module.is_embedding:
            raise AnalysisError(f"{pair.module.name}: files of kohya's scripts have no LoRA of embeddings")
        key = _key(names[pair.module.name], "text_encoder_2" in parts)
        if (other := flattened.setdefault(key, pair.module.name)) != pair.module.name:
            raise AnalysisError(f"{other} and {pair.module.name} are both {key} in a file of kohya's scripts")
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = pair.a, pair.b
        tensors[f"{key}.alpha"] = np.array(len(pair.a), np.float32)
    kinds = {key: DTYPES[dtype] for key in tensors if not key.endswith(".alpha")}
    ranks = {len(pair.a) for pair in pairs}
    rank = str(max(ranks)) if len(ranks) == 1 else "Dynamic"
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    save_tensors(tensors, kinds, folder / _FILE, metadata)
    if len(ranks) > 1 and "unet" in parts:
        yield "its ranks differ, which diffusers mistakes in attentions of a U-Net; for it, export to diffusers"


def _key(name: str, several_encoders: bool) -> str:
    model, _, path = name.partition(".")
    if model not in _MODELS:
        raise AnalysisError(f"{name}: files of kohya's scripts have no place for the {model} of a pipeline")
    short = "te1" if model == "text_encoder" and several_encoders else _MODELS[model]
    return f"lora_{short}_{path.replace('.', '_')}"


TARGET = Target(what="a file of kohya's scripts", files=(_FILE,), write=write, pipeline=True)
