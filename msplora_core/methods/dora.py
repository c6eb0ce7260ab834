"""DoRA (Liu et al. 2024, arXiv 2402.09353), as PEFT has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from msplora_core.methods.lora import Lora


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA of the weight's direction, beside a trained magnitude."""

    name = "dora"
    description = "LoRA, and the magnitudes of the weight's rows"
    switches: ClassVar[dict[str, Any]] = {"use_dora": True}
