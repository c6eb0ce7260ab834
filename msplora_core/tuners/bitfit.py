"""BitFit as a native PEFT method: configuration, layer, tuner; importing this file registers it with PEFT."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from msplora_core.tuners.strict import StrictTuner, TargetedConfig, register, unadapted_modules

PEFT_TYPE = "BITFIT"


@dataclass
class BitFitConfig(TargetedConfig):
    """How to adapt a model with BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): its biases alone are trained.

    ``target_modules`` are the modules whose biases to train; default all that have one.
    """

    peft_type: Any = PEFT_TYPE  # PEFT has a closed enumeration


class BitFitLayer(nn.Module, BaseTunerLayer):
    """A module that adds its bias last (linear layer, ``Conv1D``, layer norm), with trained changes of that bias.

    The change, zero at the start, is trained instead of the bias itself: gradients are the same, the base
    model stays as it is, and several adapters can share it.

    Args:
        base_layer: The module with the bias; frozen.
    """

    adapter_layer_names = ("bitfit_bias",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bitfit_bias = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def add_adapter(self, adapter_name: str, trainable: bool) -> None:
        """Attach one adapter: a change of the bias, zero."""
        bias: Any = self.get_base_layer().bias
        self.bitfit_bias[adapter_name] = nn.Parameter(torch.zeros(bias.shape), requires_grad=trainable)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base module's output plus the active adapters' changes; the output is (..., features)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter_name in self.active_adapters:
            if adapter_name in self.bitfit_bias:
                result = result + self.bitfit_bias[adapter_name].to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' changes to the bias.

        Args:
            safe_merge: Leave the bias alone and raise if the result is not finite.
            adapter_names: Which adapters; default the active ones.

        Raises:
            ValueError: with safe_merge, a change that is not finite.
        """
        bias: Any = self.get_base_layer().bias
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.bitfit_bias:
                continue
            change = self.bitfit_bias[adapter_name]
            if safe_merge and not torch.isfinite(change).all():
                raise ValueError(f"merging the adapter '{adapter_name}' gives biases that are not finite")
            bias.data += change.to(bias.dtype)
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Take the merged changes out of the bias again."""
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to unmerge", stacklevel=2)
        bias: Any = self.get_base_layer().bias
        while self.merged_adapters:
            bias.data -= self.bitfit_bias[self.merged_adapters.pop()].to(bias.dtype)


class BitFitModel(StrictTuner):
    """A model of which the biases are trained (BitFit, arXiv 2106.10199); made by ``peft.get_peft_model``.

    In an adapter file a bias's change stands under ``<module>.bitfit_bias``.
    """

    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # the default targets need the model: see _prepare_model

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            whole = set(peft_config.modules_to_save or ())
            peft_config.target_modules = {
                name
                for name, module in unadapted_modules(model)
                if _has_bias(module) and not whole & set(name.split("."))
            }  # fmt: skip
            if not peft_config.target_modules:
                raise ValueError("BitFit trains biases, and this model has none; choose another method")

    def _layer(self, target: nn.Module, name: str) -> BitFitLayer:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not _has_bias(base_layer):
            raise ValueError(
                f"the target module '{name}' is a {type(base_layer).__name__} without a bias; BitFit "
                "trains those of linear layers and layer norms: change target_modules or exclude_modules"
            )
        return BitFitLayer(target)

    def _add_adapter(
        self, layer: BitFitLayer, adapter_name: str, config: BitFitConfig, name: str, trainable: bool
    ) -> None:
        layer.add_adapter(adapter_name, trainable)


def _has_bias(module: nn.Module) -> bool:
    """Whether a module adds a bias to its output, last."""
    return isinstance(module, (nn.Linear, nn.LayerNorm, Conv1D)) and module.bias is not None


register(PEFT_TYPE, BitFitConfig, BitFitModel)
