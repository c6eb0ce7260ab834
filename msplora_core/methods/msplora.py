from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msplora_core.errors import TrainingError
from msplora_core.methods.base import Method
from msplora_core.methods.lora import Lora
from msplora_core.names import RANK_DECAY, SCALES
from msplora_core.options import Option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from msplora_core.data.tasks import Recipe


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

    def filled(self, recipe: Recipe) -> Method:
        if self.anneal and self.ranks:  # r is the rank of the most shared scale
            last, first = self.anneal[-1], next(iter(self.ranks.values()))
            if last != first:
                raise TrainingError(f"anneal: ends at rank {last}, and the first of 'ranks' is {first}; give the same")
        filled = super().filled(recipe)  # which refuses ranks that do not fall
        for rank in self.anneal or ():
            self.ranks_at(rank)
        return filled

    def ranks_at(self, rank: int) -> dict[str, int]:
        last = self.anneal[-1] if self.anneal else rank
        ranks: Mapping[str, float] = self.ranks or {scale: last / divisor for scale, divisor in RANK_DECAY.items()}
        found = {scale: of_scale * rank / last for scale, of_scale in ranks.items()}
        if wrong := [f"{scale} {value:g}" for scale, value in found.items() if value % 1 or value < 1]:
            raise TrainingError(f"anneal: at rank {rank} the scales keep their ratios, and {wrong[0]} is no rank")
        return {scale: int(value) for scale, value in found.items()}

    def peft_options(self, base_model: PreTrainedModel) -> dict[str, Any]:
        first = {"ranks": self.ranks_at(self.anneal[0])} if self.anneal else {}
        return super().peft_options(base_model) | first
