"""LoRA (Hu et al. 2021, arXiv 2106.09685), as PEFT has it; and the options of all that build on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msplora_core.methods.base import RankedMethod
from msplora_core.options import FRACTION, FROM_RECIPE, POSITIVE, Option

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Lora(RankedMethod):
    """a low-rank update of every adapted weight"""

    name = "lora"
    peft_config = "peft:LoraConfig"
    switches: ClassVar[dict[str, Any]] = {}
    """What else the configuration is made with."""

    lora_alpha: Annotated[float, Option("[default: the task's recipe; adalora: 32]", POSITIVE)] = FROM_RECIPE
    lora_dropout: Annotated[float, Option("[default: the task's recipe; pissa: 0]", FRACTION)] = FROM_RECIPE

    def peft_options(self, base_model: PreTrainedModel) -> dict[str, Any]:
        own = {"lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        return {**super().peft_options(base_model), **own, **self.switches}
