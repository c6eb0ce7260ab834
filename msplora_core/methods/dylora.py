"""DyLoRA: LoRA trained so that its first b rows and columns are a good adapter of rank b, for every b."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def draw(seed: int, step: int, low: int, high: int) -> int:
    """A whole number from low to high, the same in every process and in every repetition of a step."""
    return random.Random(f"{seed}, {step}").randint(low, high)


class RankSampler(TrainerCallback):
    """Trains a PEFT LoRA adapter as DyLoRA (Valipour et al. 2023, arXiv 2210.07558, algorithm 1).

    Every step draws one b from 1 to r, for all modules; the update is then alpha / b times the product of
    the first b columns of B and the first b rows of A, as in the paper (and its code). Evaluation uses all r.
    What is trained and saved is a LoRA adapter; one of rank b is the same file with its factors cut to b
    and lora_alpha, r set to alpha and b.

    Args:
        model: A model with a LoRA adapter of one rank.
        seed: Seed of the ranks drawn.
    """

    def __init__(self, model: PeftModel, seed: int, adapter_name: str = "default") -> None:
        config: Any = model.peft_config[adapter_name]
        self.seed = seed
        self.rank: int = config.r
        self.sampled: int = config.r
        for module in model.modules():
            if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
                module.lora_A[adapter_name].register_forward_hook(self._cut)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampled = draw(self.seed, state.global_step, 1, self.rank)

    def _cut(self, module: nn.Module, inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Of A x, shape (..., r), the first b values, scaled by r / b: B then adds nothing of its last columns."""
        if not module.training or self.sampled == self.rank:
            return hidden
        first = hidden[..., : self.sampled] * (self.rank / self.sampled)
        return F.pad(first, (0, self.rank - self.sampled))
