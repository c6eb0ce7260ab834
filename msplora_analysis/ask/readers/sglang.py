"""SGLang: alpha / r of the configuration for all modules."""

from __future__ import annotations

from collections.abc import Iterator

from msplora_analysis.ask.readers.base import MERGE, Fault, Reader, left_out, start
from msplora_analysis.ask.readers.facts import Facts, Module


def scale(facts: Facts, module: Module) -> float:
    return float(facts.config["lora_alpha"] / facts.config["r"])


def dora(facts: Facts) -> Iterator[Fault]:
    if facts.config.get("use_dora"):
        yield Fault(
            "dora",
            "error",
            "wrong",
            "DoRA",
            "adapter_config.json: use_dora is true; the LoRA layers have no magnitudes",
            "SGLang, python/sglang/srt/lora/lora.py",
            MERGE,
        )


READER = Reader(
    name="sglang",
    title="SGLang",
    layouts=("peft",),
    to="peft",
    source="SGLang, python/sglang/srt/lora/lora.py: alpha / r; later versions may know more",
    scale=scale,
    scale_severity="warning",
    rules=(start, dora, left_out("SGLang, python/sglang/srt/lora/lora_manager.py, load_lora")),
)
