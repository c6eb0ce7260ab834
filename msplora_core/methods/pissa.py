from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from msplora_core.methods.base import Training
from msplora_core.methods.lora import LoraMethod

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


class Pissa(LoraMethod):
    """LoRA from the weight's largest singular values on (arXiv 2404.02948)"""

    name = "pissa"
    # it trains a part of the weight, which decay would shrink and dropout leave out
    defaults: ClassVar[dict[str, float]] = {"weight_decay": 0.0, "lora_dropout": 0.0}
    switches: ClassVar[dict[str, Any]] = {"init_lora_weights": "pissa"}

    def training(self, model: PeftModel, seed: int) -> Training:
        return InitialFactors(model)


class InitialFactors(Training):
    """The factors that PiSSA starts from, and the way back to a LoRA adapter.

    PiSSA splits B0 A0, the largest singular values, off the weight and trains them, so an adapter
    file of its own needs a base model changed in the same way, and hides what was learned beside what
    the weight was. Relative to the unchanged base the update is

        B A - B0 A0 = (B - B0) A + B0 (A - A0) = [B - B0, B0] [A; A - A0],

    a LoRA adapter of twice the rank. It is exactly zero before training, and loses no digits to
    cancellation while changes are small, which [B, -B0] [A; A0] (PEFT's conversion) does.

    Args:
        model: A model with a PiSSA adapter, before its first step.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.tensors = {
            name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name.endswith((_A, _B))
        }

    def state(self) -> dict[str, Any]:
        """Nothing but the trained parameters, which the adapter's file does not hold as they are."""
        return {}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Have the model give the change of its factors, and a configuration that fits it."""
        config = self.model.peft_config["default"]
        own = config.r, config.lora_alpha, config.init_lora_weights
        config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
        hook = self.model.register_state_dict_post_hook(lambda model, tensors, *where: self._to_changes(tensors))
        try:
            yield
        finally:
            hook.remove()
            config.r, config.lora_alpha, config.init_lora_weights = own

    def _to_changes(self, tensors: dict[str, torch.Tensor]) -> None:
        import torch

        for name, initial in self.tensors.items():
            now, before = tensors[name], initial.to(tensors[name].device)
            if name.endswith(_A):
                tensors[name] = torch.cat([now, now - before], dim=0)
            else:
                tensors[name] = torch.cat([now - before, before], dim=1)
