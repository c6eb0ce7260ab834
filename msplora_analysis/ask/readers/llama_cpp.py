"""llama.cpp: its own GGUF file, or PEFT's folder through convert_lora_to_gguf.py."""

from __future__ import annotations

from collections.abc import Iterator

from msplora_analysis.ask.readers.base import MERGE, Fault, Reader, deeper, listed, start
from msplora_analysis.ask.readers.facts import Facts, Module, without

_CONVERTER = "llama.cpp, convert_lora_to_gguf.py"


def scale(facts: Facts, module: Module) -> float:
    if facts.layout == "gguf" and module.scale is not None:
        return module.scale
    alpha = float(facts.config["lora_alpha"])
    return alpha / module.rank if alpha else 1.0


def rest(facts: Facts) -> Iterator[Fault]:
    if facts.layout == "peft" and (others := list(without(facts.rest, "_layernorm", ".norm"))):
        yield Fault(
            "keys",
            "error",
            "refuses it",
            "its converter stops at tensors that are no factors",
            listed(others),
            f"{_CONVERTER}, get_tensors",
            MERGE,
        )


READER = Reader(
    name="llama.cpp",
    title="llama.cpp",
    layouts=("gguf", "peft"),
    to="gguf --base MODEL",
    source=f"{_CONVERTER} writes lora_alpha alone; src/llama-adapter.h divides it by each module's own rank",
    scale=scale,
    rules=(start, deeper, rest),
)
