from dataclasses import dataclass
from typing import Annotated, Any

from msplora_core.errors import TrainingError
from msplora_core.methods.base import Method
from msplora_core.methods.lora import Lora
from msplora_core.names import SCALES
from msplora_core.options import Option


def parse_ranks(text: str) -> dict[str, int]:
    """Ranks of the scales from ``"8,4,2"``: global, mid, layer.

    Raises:
        TrainingError: not three whole numbers of at least 1.
    """
    parts = text.split(",")
    if len(parts) != len(SCALES) or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise TrainingError(f"ranks='{text}': expected {len(SCALES)} ranks for {', '.join(SCALES)}, such as 8,4,2")
    return {scale: int(part) for scale, part in zip(SCALES, parts, strict=True)}


@dataclass(frozen=True)
class MSPLora(Lora):
    """LoRA parts shared by all layers, by a third, and by none (arXiv 2503.21838)"""

    name = "msplora"
    peft_config = "msplora_core.tuners.msplora:MSPLoraConfig"

    ranks: Annotated[
        dict[str, int] | None, Option("MSPLoRA's ranks global,mid,layer, such as 8,8,8.", parse=parse_ranks)
    ] = None

    @classmethod
    def from_options(cls, given: dict[str, Any]) -> Method:
        if {"rank", "ranks"} <= given.keys():
            raise TrainingError("'rank' and 'ranks' (one for each scale) exclude each other: choose one")
        return super().from_options(given)
