"""Bottleneck adapters with AdapterDrop as a native PEFT method; importing this file registers them with PEFT."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features, check_target_module_exists
from peft.utils import PeftType, register_peft_method
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn

from msplora_core.tuners.strict import AdapterLayer, StrictTuner, TargetedConfig


@dataclass
class BottleneckConfig(TargetedConfig):
    """How to adapt a model with bottleneck adapters, and which to drop (AdapterDrop, arXiv 2010.11918).

    An adapter is h + W_up relu(W_down h + b_down) + b_up, of the output h of a linear layer, before the dropout,
    residual and norm that follow (Houlsby et al. 2019, arXiv 1902.00751). There is one in every layer, behind its
    feed-forward part (Pfeiffer et al. 2021, arXiv 2005.00247). W_up and the biases are zero at the start.

    Args:
        bottleneck: Width of the adapter, the rows of W_down.
        dropped_layers: How many of the lowest layers have no adapter (specialised AdapterDrop).

    ``target_modules`` are the linear layers to put an adapter behind; default the last one of every feed-forward part.

    Raises:
        ValueError: a bottleneck or a number of dropped layers out of its range.
    """

    title: ClassVar[str] = "bottleneck"

    bottleneck: int = 16
    dropped_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("BOTTLENECK")
        for name, least in (("bottleneck", 1), ("dropped_layers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number of at least {least}")


class BottleneckLinear(AdapterLayer):
    """A linear layer whose output h becomes h + W_up relu(W_down h + b_down) + b_up.

    Args:
        base_layer: The linear layer; frozen.
        number: Number of the transformer layer that it is in, from 0.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, number: int) -> None:
        super().__init__(base_layer)
        self.number = number
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.is_dropped = False
        """Whether training leaves the adapters out, for now; evaluation never does."""

    def update_layer(self, adapter_name: str, config: BottleneckConfig, trainable: bool) -> None:
        """Attach one adapter, which changes nothing before training."""
        down, up = nn.Linear(self.out_features, config.bottleneck), nn.Linear(config.bottleneck, self.out_features)
        if config.init_weights:
            nn.init.normal_(down.weight, std=0.02)  # as the weights of BERT
            for zero in (down.bias, up.weight, up.bias):
                nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name] = down.requires_grad_(trainable)
        self.bottleneck_up[adapter_name] = up.requires_grad_(trainable)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _adapted(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        if self.is_dropped and self.training:
            return result
        down: Any = self.bottleneck_down[adapter_name]
        hidden = F.relu(down(self._cast_input_dtype(result, down.weight.dtype)))
        return result + self.bottleneck_up[adapter_name](hidden).to(result.dtype)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Not possible: the adapter is not linear."""
        raise NotImplementedError("bottleneck adapters are not linear and cannot be merged into a weight")


class BottleneckModel(StrictTuner):
    """A model with bottleneck adapters (arXiv 1902.00751, 2010.11918); made by ``peft.get_peft_model``.

    In an adapter file the parts of an adapter stand under ``<module>.bottleneck_down`` and ``<module>.bottleneck_up``.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # the default targets need the model: see _prepare_model

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Name the targets in full: PEFT's "output.dense" is the attention's too, and dropped layers have none."""
        by_default = peft_config.target_modules is None
        if by_default:
            super()._prepare_adapter_config(peft_config, self.get_model_config(model))
        names = [name for name, _ in model.named_modules() if name and check_target_module_exists(peft_config, name)]
        if by_default:
            names = [name for name in names if not any("attention" in part for part in name.split("."))]
        kept = {name for name in names if layer_number(name) >= peft_config.dropped_layers}
        if names and not kept:
            layers = max(map(layer_number, names)) + 1
            raise ValueError(
                f"dropped_layers={peft_config.dropped_layers} leaves none of the {layers} layers an adapter"
            )
        peft_config.target_modules = kept or peft_config.target_modules

    def _layer(self, target: nn.Module, base_layer: nn.Module, name: str) -> BottleneckLinear:
        _, features = _get_in_out_features(base_layer)
        if features is None:
            raise ValueError(
                f"the target module '{name}' is a {type(base_layer).__name__}; bottleneck adapters "
                "stand behind linear layers: change target_modules or exclude_modules"
            )
        return BottleneckLinear(target, layer_number(name))


def layer_number(name: str) -> int:
    """Number of the layer that a module is in: the first part of its name that is a number; 0 without one."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)


register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
