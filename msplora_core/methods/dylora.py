from __future__ import annotations

from typing import TYPE_CHECKING

from msplora_core.methods.base import Training, draw
from msplora_core.methods.lora import LoraMethod

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn


class DyLora(LoraMethod):
    """LoRA of use at every rank up to --rank (arXiv 2210.07558)"""

    name = "dylora"

    def training(self, model: PeftModel, seed: int) -> Training:
        return RankSampler(model, seed)


class RankSampler(Training):
    """Trains a PEFT LoRA adapter as DyLoRA (Valipour et al. 2023, arXiv 2210.07558, algorithm 1).

    Every step draws one b from 1 to r, for all modules; the update is then alpha / b times the product of
    the first b columns of B and the first b rows of A, as in the paper (and its code). Evaluation uses all r.
    What is trained and saved is a LoRA adapter; one of rank b is the same file with its factors cut to b
    and lora_alpha, r set to alpha and b.

    Args:
        model: A model with a LoRA adapter of one rank.
        seed: Seed of the ranks drawn.
    """

    def __init__(self, model: PeftModel, seed: int) -> None:
        from peft.tuners.lora import LoraLayer

        self.seed = seed
        self.rank: int = model.peft_config["default"].r
        self.sampled = self.rank
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.lora_A["default"].register_forward_hook(self._cut)

    def before_step(self, step: int) -> None:
        self.sampled = draw(self.seed, step, 1, self.rank)

    def _cut(self, module: nn.Module, inputs: tuple[torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """Of A x, shape (..., r), the first b values, scaled by r / b: B then adds nothing of its last columns."""
        from torch.nn.functional import pad

        if not module.training or self.sampled == self.rank:
            return hidden
        first = hidden[..., : self.sampled] * (self.rank / self.sampled)
        return pad(first, (0, self.rank - self.sampled))
