"""What PEFT leaves to the training loop of AdaLoRA: its schedule, its steps, and its state between two runs."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

INITIAL_RANK = 1.5
"""Rank at the start as a multiple of the average rank at the end (Zhang et al. 2023, arXiv 2303.10512, section 3.3)."""

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankPruning(TrainerCallback):
    """Prunes singular values after every optimiser step of the Trainer's schedule.

    Nothing is pruned in the first tenth of the steps, and the ranks stay in the last half, about as for the
    GLUE tasks of the paper (table 10 there); between, ranks are chosen about 500 times a training.

    Args:
        model: A model with an AdaLoRA adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self.tuner: Any = model.base_model
        configs: Any = model.peft_config
        self.config: Any = configs[self.tuner.trainable_adapter_name]
        # PEFT adds the orthogonality term to every loss; it belongs to training, not to what is evaluated.
        self.weight: float = self.config.orth_reg_weight
        self.tuner.register_forward_pre_hook(self._weigh)
        self.tuner.register_forward_hook(self._restore_weight, always_call=True)

    def _weigh(self, module: nn.Module, inputs: Any) -> None:
        self.config.orth_reg_weight = self.weight if module.training else 0.0

    def _restore_weight(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.config.orth_reg_weight = self.weight

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = state.max_steps
        self.config.total_step = steps
        self.config.tinit = steps // 10
        self.config.tfinal = steps // 2
        self.config.deltaT = max(1, steps // 500)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tuner.update_and_allocate(state.global_step + 1)  # the step that ends now; PEFT counts from 1

    def state_dict(self) -> dict[str, Any]:
        """The averages that pruning goes by, and what it keeps now."""
        averages = {name: getattr(self.tuner.rankallocator, name) for name in _AVERAGES}
        return {"rank_pattern": self.config.rank_pattern, **averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.config.rank_pattern = state["rank_pattern"]
        parameters = dict(self.tuner.model.named_parameters())
        for name in _AVERAGES:
            values: dict[str, torch.Tensor] = state[name]
            on_device = {key: value.to(parameters[key].device) for key, value in values.items()}
            setattr(self.tuner.rankallocator, name, on_device)
