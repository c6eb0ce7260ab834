"""PEFT: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from msplora_analysis.write.base_model import BaseModel
from msplora_analysis.write.source import Source
from msplora_analysis.write.targets.protocol import Target
from msplora_analysis.write.write import WEIGHTS_NAME, Pair, write_peft
from msplora_core.names import CONFIG


def write(folder: Path, pairs: Sequence[Pair], dtype: str, source: Source, base: BaseModel | None) -> Iterator[str]:
    write_peft(folder, pairs, dtype, source)
    yield from ()


TARGET = Target(what="a plain LoRA", files=(CONFIG, WEIGHTS_NAME), write=write, rest=True)
