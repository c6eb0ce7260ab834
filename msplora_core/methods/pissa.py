"""PiSSA adapters saved as what training changed, a LoRA adapter for the unchanged base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel


class InitialFactors:
    """The factors that PiSSA (Meng et al. 2024, arXiv 2404.02948) starts from, and the way back to a LoRA adapter.

    PiSSA splits B0 A0, the largest singular values, off the weight and trains them, so an adapter
    file of its own needs a base model changed in the same way, and hides what was learned beside what
    the weight was. Relative to the unchanged base the update is

        B A - B0 A0 = (B - B0) A + B0 (A - A0) = [B - B0, B0] [A; A - A0],

    a LoRA adapter of twice the rank. It is exactly zero before training, and loses no digits to
    cancellation while changes are small, which [B, -B0] [A; A0] (PEFT's conversion) does.

    Args:
        model: A model with a PiSSA adapter, before its first step.
    """

    def __init__(self, model: PeftModel, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name
        self.tensors = {
            name: tensor.detach().clone()
            for name, tensor in model.state_dict().items()
            if self._is_factor(name, "A") or self._is_factor(name, "B")
        }

    def _is_factor(self, name: str, factor: str) -> bool:
        return name.endswith(f".lora_{factor}.{self.adapter_name}.weight")

    @contextmanager
    def saving_changes(self, model: PeftModel, state_dict: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Give the state dict to save, while the model's configuration is the one to save with it."""
        changed = dict(model.state_dict() if state_dict is None else state_dict)
        for name, initial in self.tensors.items():
            now = changed[name]
            change = now - initial.to(now.device)
            if self._is_factor(name, "A"):
                changed[name] = torch.cat([now, change])
            else:
                changed[name] = torch.cat([change, initial.to(now.device)], dim=1)
        config: Any = model.peft_config[self.adapter_name]
        own = config.r, config.lora_alpha, config.init_lora_weights
        config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
        try:
            yield changed
        finally:
            config.r, config.lora_alpha, config.init_lora_weights = own
