from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msplora_core.methods.base import Training
from msplora_core.methods.lora import LoraMethod
from msplora_core.options import NOT_NEGATIVE, Option

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Sora(LoraMethod):
    """LoRA with a gate for each rank, which training may close (arXiv 2311.11696)"""

    name = "sora"
    peft_config = "msplora_core.tuners.sora:SoraConfig"

    sparsity: Annotated[float, Option("How far each step pulls SoRA's gates to zero.", NOT_NEGATIVE)] = 1e-3

    def training(self, model: nn.Module, seed: int) -> Training:
        return ProximalStep(model, self.sparsity)


class ProximalStep(Training):
    """Pulls every gate to zero after each step of the optimiser; one that would cross zero is closed.

    As the released code does (TsinghuaC3I/SoRA, src/sparse_optimizer.py): soft thresholding by a fixed amount, after
    AdamW without weight decay at the learning rate of the other parameters. The code adds an L1 term of the gates to
    the loss besides; here the proximal step is alone.

    Args:
        model: A model with a SoRA adapter.
        sparsity: The threshold.
    """

    def __init__(self, model: nn.Module, sparsity: float) -> None:
        from msplora_core.tuners.sora import GatedPair  # PEFT takes seconds to import

        self.gates = [module.gate for module in model.modules() if isinstance(module, GatedPair)]
        self.sparsity = sparsity

    def arrange(self, optimizer: torch.optim.Optimizer) -> None:
        own = {id(gate) for gate in self.gates}
        for group in list(optimizer.param_groups):
            taken = [parameter for parameter in group["params"] if id(parameter) in own]
            if taken:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                optimizer.add_param_group({**group, "params": taken, "weight_decay": 0.0})

    def after_update(self, step: int) -> None:
        from torch.nn.functional import softshrink

        for gate in self.gates:
            gate.data = softshrink(gate.data, self.sparsity)
