"""diffusers: pytorch_lora_weights.safetensors with ``<model>.<module>.lora_A.weight``, and PEFT's settings as metadata.

Without the metadata diffusers takes the scale as 1 where all ranks are equal, which is right here too; where they
differ, versions before its pull request 14409 take one alpha for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from msplora_analysis.errors import AnalysisError
from msplora_analysis.write.base_model import BaseModel, placed
from msplora_analysis.write.source import Source
from msplora_analysis.write.targets.protocol import Target
from msplora_analysis.write.write import DTYPES, Array, Pair, peft_config, save_tensors

_FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"


def write(folder: Path, pairs: Sequence[Pair], dtype: str, source: Source, base: BaseModel | None) -> Iterator[str]:
    tensors: dict[str, Array] = {}
    ranks: dict[str, dict[str, int]] = {}  # of each model of the pipeline
    names = placed((pair.module.name for pair in pairs), base)
    for pair in pairs:
        if pair.module.is_embedding:
            raise AnalysisError(f"{pair.module.name}: diffusers has no LoRA of embeddings")
        name = names[pair.module.name]
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = pair.a, pair.b
        model, _, path = name.partition(".")
        ranks.setdefault(model, {})[path] = len(pair.a)
    about = {f"{model}.{key}": value for model, of in ranks.items() for key, value in peft_config(of, {}).items()}
    metadata = {_METADATA: json.dumps(about, indent=2, sort_keys=True)}
    save_tensors(tensors, dict.fromkeys(tensors, DTYPES[dtype]), folder / _FILE, metadata)
    if any(len(set(of.values())) > 1 for of in ranks.values()):
        yield "its ranks differ: diffusers scales them wrongly in versions that do not read the metadata of the file"


TARGET = Target(what="a file of diffusers", files=(_FILE,), write=write, pipeline=True)
