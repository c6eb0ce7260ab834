"""Robust AdapterDrop: adapters trained to work without those of the lower layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from msplora_core.methods.dylora import draw
from msplora_core.tuners.bottleneck.layer import BottleneckLinear


class LayerDropper(TrainerCallback):
    """Leaves out the adapters of the n lowest layers in every training step, n drawn from 0 to all but one.

    Rücklé et al. 2021 (arXiv 2010.11918, section 3.1, robust AdapterDrop). Evaluation uses all adapters.

    Args:
        model: A model with bottleneck adapters.
        seed: Seed of the numbers drawn.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.seed = seed
        self.adapted = [module for module in model.modules() if isinstance(module, BottleneckLinear)]
        self.layers = 1 + max(layer.number for layer in self.adapted)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dropped = draw(self.seed, state.global_step, 0, self.layers - 1)
        for layer in self.adapted:
            layer.is_dropped = layer.number < dropped
