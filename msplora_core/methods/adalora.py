from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msplora_core.methods.base import Training
from msplora_core.methods.lora import LoraMethod
from msplora_core.options import NOT_NEGATIVE, Option

if TYPE_CHECKING:
    from peft import AdaLoraModel, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

_INITIAL_RANK = 1.5
"""Rank at the start as a multiple of the average rank at the end (arXiv 2303.10512, section 3.3)."""

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@dataclass(frozen=True)
class AdaLora(LoraMethod):
    """singular values, pruned to --rank of them on average (arXiv 2303.10512)"""

    name = "adalora"
    peft_config = "peft:AdaLoraConfig"
    defaults: ClassVar[dict[str, float]] = {"lora_alpha": 32}  # as most of its authors' scripts for GLUE

    orthogonality: Annotated[
        float,
        Option("Weight of AdaLoRA's orthogonality term in the loss.", NOT_NEGATIVE, unrecorded=0.5),
    ] = 0.1

    def peft_options(self, base_model: PreTrainedModel) -> dict[str, Any]:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS

        return {
            # PEFT's default for AdaLoRA has other modules, the classifier's among them
            "target_modules": self.target_modules or LORA_TARGETS.get(base_model.config.model_type),
            "target_r": self.rank,
            "init_r": math.ceil(_INITIAL_RANK * self.rank),
            "orth_reg_weight": self.orthogonality,
            "total_step": 1,  # the schedule needs the true number: RankPruning gives it
        }

    def training(self, model: PeftModel, seed: int) -> Training:
        return RankPruning(model)


class RankPruning(Training):
    """Prunes singular values after every optimiser step of the schedule.

    Nothing is pruned in the first tenth of the steps, and the ranks stay in the last half, about as for the
    GLUE tasks of the paper (table 10 there); between, ranks are chosen about 500 times a training.
    Adapter files are pruned, and pruned components may come back: training continues from its own state.

    Args:
        model: A model with an AdaLoRA adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self.tuner: AdaLoraModel = model.base_model
        self.config = model.peft_config[self.tuner.trainable_adapter_name]
        # PEFT adds the orthogonality term to every loss; it belongs to training, not to what is evaluated.
        self.weight: float = self.config.orth_reg_weight
        self.tuner.register_forward_pre_hook(self._weigh)
        self.tuner.register_forward_hook(self._restore_weight, always_call=True)

    def _weigh(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.config.orth_reg_weight = self.weight if module.training else 0.0

    def _restore_weight(self, module: nn.Module, inputs: tuple[Any, ...], outputs: object) -> None:
        self.config.orth_reg_weight = self.weight

    def begin(self, steps: int) -> None:
        self.config.total_step = steps
        self.config.tinit = steps // 10
        self.config.tfinal = steps // 2
        self.config.deltaT = max(1, steps // 500)

    def after_update(self, step: int) -> None:
        self.tuner.update_and_allocate(step + 1)  # PEFT counts from 1

    def state(self) -> dict[str, Any]:
        """The averages that pruning goes by, and what it keeps now."""
        averages = {name: getattr(self.tuner.rankallocator, name) for name in _AVERAGES}
        return {"rank_pattern": self.config.rank_pattern, **averages}

    def load(self, state: dict[str, Any]) -> None:
        self.config.rank_pattern = state["rank_pattern"]
        parameters = dict(self.tuner.model.named_parameters())
        for name in _AVERAGES:
            on_device = {key: value.to(parameters[key].device) for key, value in state[name].items()}
            setattr(self.tuner.rankallocator, name, on_device)
