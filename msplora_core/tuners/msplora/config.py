"""Configuration of MSPLoRA, as PEFT stores it in ``adapter_config.json``."""

import math
from dataclasses import dataclass
from typing import ClassVar

from peft.utils import PeftType

from ..strict import TargetedConfig

SCALES = ("global", "mid", "layer")
"""The scales, from the most to the least shared."""


@dataclass
class MSPLoraConfig(TargetedConfig):
    """How to adapt a model with MSPLoRA (Multi-Scale Pyramid LoRA, arXiv 2503.21838).

    Every adapted weight gets ``dW = sum over scales of scaling_s * B_s A_s``, with B_s of shape
    (out_features, rank_s), zero at the start, and A_s of shape (rank_s, in_features), Kaiming uniform.

    Args:
        r: Rank of the global scale; mid and layer have r/2 and r/4, so it must be a multiple of 4.
        target_modules: As in ``LoraConfig``, ``"all-linear"`` too. Default: what PEFT's LoRA adapts in that
            architecture.
        lora_alpha: Numerator of the scaling, lora_alpha / rank_s for each scale.
        lora_dropout: Probability of dropping an input of the adapter.
        ranks: Explicit ranks, such as ``{"global": 8, "mid": 8, "layer": 8}``, instead of ``r``. A scale
            that is left out does not exist.
        mid_groups: Number of groups of the mid scale: contiguous runs of layers whose sizes differ by at
            most one.
        use_rslora: Scale by lora_alpha / sqrt(rank_s) (rsLoRA, arXiv 2312.03732).
        bias: ``"none"``, ``"all"`` or ``"msplora_only"``: which biases are trained too.
        layers_to_transform: Numbers of the layers to adapt; default all.
        layers_pattern: Name of the list of layers that ``layers_to_transform`` counts in.

    Raises:
        ValueError: a rank that is not a positive whole number, an unknown scale, or an unknown bias.
    """

    title: ClassVar[str] = "MSPLoRA"

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    ranks: dict[str, int] | None = None
    mid_groups: int = 3
    use_rslora: bool = False
    bias: str = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("MSPLORA")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: say which layers to adapt")
        if isinstance(self.r, list):
            raise ValueError(
                f"r={self.r} is a list, as the code released with the MSPLoRA paper writes it; its adapters "
                "are another format and cannot be loaded into a model here"
            )
        if self.bias not in ("none", "all", "msplora_only"):
            raise ValueError(f"bias={self.bias!r} is unknown; choose from 'none', 'all', 'msplora_only'")
        if not _is_positive_int(self.mid_groups):
            raise ValueError(f"mid_groups={self.mid_groups!r} must be a whole number of at least 1")
        self.scale_ranks()  # a wrong rank is told here, not at the first use

    def scale_ranks(self) -> dict[str, int]:
        """Rank of every scale, from the most to the least shared."""
        if self.ranks is None:
            if not _is_positive_int(self.r) or self.r % 4:
                raise ValueError(
                    f"r={self.r!r} must be a positive multiple of 4, so that r, r/2 and r/4 are ranks; give "
                    'ranks={"global": .., "mid": .., "layer": ..} for others'
                )
            return {"global": self.r, "mid": self.r // 2, "layer": self.r // 4}
        if not self.ranks or not set(self.ranks) <= set(SCALES):
            raise ValueError(f"ranks={self.ranks!r} must name scales among {', '.join(SCALES)}")
        for scale, rank in self.ranks.items():
            if not _is_positive_int(rank):
                raise ValueError(
                    f"ranks: the rank {rank!r} of the scale '{scale}' must be a whole number of at least 1"
                )
        return {scale: self.ranks[scale] for scale in SCALES if scale in self.ranks}

    def scale_scalings(self) -> dict[str, float]:
        """Factor in front of B_s A_s for every scale: lora_alpha / rank_s, or / sqrt(rank_s) with rsLoRA."""
        return {
            scale: self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)
            for scale, rank in self.scale_ranks().items()
        }


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
