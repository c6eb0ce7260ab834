"""LoRA (Hu et al. 2021, arXiv 2106.09685), as PEFT has it; and the options of all that build on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msplora_core.methods.base import RankedMethod
from msplora_core.options import FRACTION, FROM_RECIPE, POSITIVE, Option

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Lora(RankedMethod):
    """a low-rank update of every adapted weight"""

    name = "lora"
    switches: ClassVar[dict[str, Any]] = {}
    """What else is given to PEFT's ``LoraConfig``."""

    lora_alpha: Annotated[float, Option("[default: the task's recipe; adalora: 32]", POSITIVE)] = FROM_RECIPE
    lora_dropout: Annotated[float, Option("[default: the task's recipe; pissa: 0]", FRACTION)] = FROM_RECIPE

    def config(self, base_model: PreTrainedModel, task_type: str) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(r=self.rank, **self.options(task_type), **self.switches)

    def options(self, task_type: str) -> dict[str, Any]:
        """LoRA's options as PEFT's configurations take them, without the rank."""
        named = {name: getattr(self, name) for name in ("target_modules", "lora_alpha", "lora_dropout")}
        return {**named, "task_type": task_type}
