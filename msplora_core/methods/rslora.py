"""rsLoRA (Kalajdzievski 2023, arXiv 2312.03732), as PEFT has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from msplora_core.methods.lora import Lora


@dataclass(frozen=True)
class RsLora(Lora):
    """LoRA with a scaling that suits large ranks."""

    name = "rslora"
    description = "LoRA scaled by alpha / sqrt(rank)"
    switches: ClassVar[dict[str, Any]] = {"use_rslora": True}
