"""SGLang: alpha / r of the configuration for all modules."""

from __future__ import annotations

from collections.abc import Iterator

from msplora_analysis.ask.readers.base import (
    MERGE,
    Fault,
    Reader,
    activated,
    deeper,
    left_out,
    listed,
    no_targets,
    start,
)
from msplora_analysis.ask.readers.facts import Facts, Module

_CODE = "SGLang, python/sglang/srt/lora/lora.py"


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
            _CODE,
            MERGE,
        )


def experts(facts: Facts) -> Iterator[Fault]:
    named = facts.experts
    if facts.config.get("target_parameters") and named:
        yield Fault(
            "experts",
            "error",
            "in part",
            "experts in one tensor",
            f"adapter_config.json: target_parameters; {listed(named)}",
            "github.com/sgl-project/sglang/pull/25528 (closed): names of PEFT 0.18 and later are not known",
            MERGE,
        )


READER = Reader(
    name="sglang",
    title="SGLang",
    layouts=("peft",),
    to="peft",
    source=f"{_CODE}, LoRAAdapter: alpha / r; rsLoRA: github.com/sgl-project/sglang/issues/40835 (open in autumn 2026)",
    scale=scale,
    rules=(
        *(start, deeper, activated, no_targets("SGLang, python/sglang/srt/lora/lora_config.py"), dora, experts),
        left_out("SGLang, python/sglang/srt/lora/lora_manager.py, load_lora"),
    ),
)
