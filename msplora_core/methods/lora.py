from dataclasses import dataclass
from typing import Annotated

from msplora_core.methods.base import AnnealedMethod, RankedMethod
from msplora_core.options import FRACTION, FROM_RECIPE, POSITIVE, Option


@dataclass(frozen=True)
class LoraMethod(RankedMethod):
    """A method of PEFT's LoRA, or with its options."""

    peft_config = "peft:LoraConfig"

    lora_alpha: Annotated[float, Option("Scale of the update: alpha / rank.  [default: 16; adalora: 32]", POSITIVE)] = (
        FROM_RECIPE
    )
    lora_dropout: Annotated[float, Option("Dropout before A.  [default: 0.05; pissa: 0]", FRACTION)] = FROM_RECIPE


@dataclass(frozen=True)
class Lora(AnnealedMethod, LoraMethod):
    """a low-rank update of every adapted weight (arXiv 2106.09685)"""

    name = "lora"
