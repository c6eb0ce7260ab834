"""LoRA (Hu et al. 2021, arXiv 2106.09685), as PEFT has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from msplora_core.methods.base import LoraMethod

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Lora(LoraMethod):
    """LoRA, and what is LoRA but for switches of PEFT's ``LoraConfig``."""

    name: ClassVar[str] = "lora"
    description: ClassVar[str] = "a low-rank update of every adapted weight"
    switches: ClassVar[dict[str, Any]] = {}

    def config(self, base_model: PreTrainedModel, task_type: str) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(**self.lora(task_type), **self.switches)
