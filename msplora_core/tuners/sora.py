"""SoRA as a native PEFT method; importing this file registers it with PEFT."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.utils import PeftType, register_peft_method
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from msplora_core.tuners.strict import AdapterLayer, StrictTuner, TargetedConfig


@dataclass
class SoraConfig(TargetedConfig):
    """How to adapt a model with SoRA (Ding et al. 2023, arXiv 2311.11696), as its released code makes it.

    Every adapted weight gets ΔW = lora_alpha / r · B diag(gate) A: A (r, in) Kaiming uniform, B (out, r) zero, the r
    gates normal (TsinghuaC3I/SoRA, src/lora.py). Training closes gates: :class:`msplora_core.methods.sora.Sora`.

    Args:
        r: The rank, of all gates, closed ones too.
        lora_alpha: Numerator of the scale.
        lora_dropout: Probability of dropping an input of the adapter.

    Raises:
        ValueError: a rank that is not a positive whole number.
    """

    title: ClassVar[str] = "SoRA"

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("SORA")
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r={self.r!r} must be a whole number of at least 1")


class GatedPair(nn.Module):
    """The factors and the gates of one adapter, by the names that the released code gives them."""

    def __init__(self, in_features: int, out_features: int, config: SoraConfig) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(config.r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.r))
        self.gate = nn.Parameter(torch.randn(1, config.r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        self.dropout = nn.Dropout(config.lora_dropout)
        self.scaling = config.lora_alpha / config.r


class SoraLinear(AdapterLayer):
    """A linear layer (``nn.Linear``, or transformers' ``Conv1D``) with SoRA adapters."""

    adapter_layer_names = ("sora_pair",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.sora_pair = nn.ModuleDict()

    def update_layer(self, adapter_name: str, config: SoraConfig, trainable: bool) -> None:
        """Attach one adapter, which changes nothing before training."""
        pair = GatedPair(self.in_features, self.out_features, config)
        self.sora_pair[adapter_name] = pair.requires_grad_(trainable)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _adapted(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        pair: Any = self.sora_pair[adapter_name]
        hidden = F.linear(pair.dropout(self._cast_input_dtype(x, pair.lora_A.dtype)), pair.lora_A) * pair.gate
        return result + pair.scaling * F.linear(hidden, pair.lora_B)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The update, in the base weight's layout: (out, in), for ``Conv1D`` (in, out)."""
        pair: Any = self.sora_pair[adapter_name]
        delta: torch.Tensor = pair.scaling * (pair.lora_B * pair.gate) @ pair.lora_A
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta


class SoraModel(StrictTuner):
    """A model adapted with SoRA; made by ``peft.get_peft_model``.

    In an adapter file stand ``<module>.sora_pair.lora_A``, ``.lora_B`` and ``.gate``. The released code has ``lora``
    for ``sora_pair``, which PEFT keeps for LoRA.
    """

    prefix = "sora_"
    tuner_layer_cls = SoraLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _layer(self, target: nn.Module, base_layer: nn.Module, name: str) -> SoraLinear:
        if not isinstance(base_layer, (nn.Linear, Conv1D)):
            raise ValueError(
                f"the target module '{name}' is a {type(base_layer).__name__}; SoRA adapts nn.Linear and "
                "transformers' Conv1D: change target_modules or exclude_modules"
            )
        return SoraLinear(target)


register_peft_method(name="sora", config_cls=SoraConfig, model_cls=SoraModel)
