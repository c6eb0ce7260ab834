"""ComfyUI: files of diffusers and kohya; of a scale it knows the tensor ``.alpha`` alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

from msplora_analysis.ask.readers.base import MERGE, Fault, Reader, left_out, listed
from msplora_analysis.ask.readers.facts import Facts, Module

_CODE = "ComfyUI, comfy/weight_adapter/lora.py, calculate_weight"


def scale(facts: Facts, module: Module) -> float:
    own = re.split(r"[._]lora[._]|\.hada_|\.lokr_", module.a)[0]
    return module.scale if f"{own}.alpha" in facts.shapes and module.scale is not None else 1.0


def magnitudes(facts: Facts) -> Iterator[Fault]:
    if found := [name for name in facts.rest if "lora_magnitude_vector" in name]:
        yield Fault(
            "dora",
            "error",
            "wrong",
            "DoRA as PEFT spells it",
            listed(found),
            "ComfyUI, comfy/lora.py: dora_scale is read, lora_magnitude_vector is not",
            MERGE,
        )


READER = Reader(
    name="comfyui",
    title="ComfyUI",
    layouts=("kohya", "diffusers"),
    to="kohya --base MODEL",
    source=f"{_CODE}: alpha / rank with a tensor .alpha, else 1",
    scale=scale,
    rules=(magnitudes, left_out("ComfyUI, comfy/lora.py, load_lora: lora key not loaded", "warning")),
)
