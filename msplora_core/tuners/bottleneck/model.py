"""The PEFT tuner of bottleneck adapters."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn

from msplora_core.tuners.bottleneck.config import PEFT_TYPE, BottleneckConfig
from msplora_core.tuners.bottleneck.layer import BottleneckLinear
from msplora_core.tuners.strict import StrictTuner, register


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

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLinear):
            layer = target
        else:
            base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            _, features = _get_in_out_features(base_layer)
            if features is None:
                raise ValueError(
                    f"the target module '{current_key}' is a {type(base_layer).__name__}; bottleneck adapters "
                    "stand behind linear layers: change target_modules or exclude_modules"
                )
            layer = BottleneckLinear(target, features, layer_number(current_key))
        # a further adapter is not trained before set_adapter makes it the active one
        layer.add_adapter(adapter_name, peft_config.bottleneck, trainable=adapter_name in self.active_adapters)
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)


def layer_number(name: str) -> int:
    """Number of the layer that a module is in: the first part of its name that is a number; 0 without one."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)


register(PEFT_TYPE, BottleneckConfig, BottleneckModel)
