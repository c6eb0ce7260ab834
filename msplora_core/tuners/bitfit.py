"""BitFit as a native PEFT method: configuration, layer, tuner; importing this file registers it with PEFT."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.utils import PeftType, register_peft_method
from torch import nn
from transformers.pytorch_utils import Conv1D

from msplora_core.tuners.strict import AdapterLayer, StrictTuner, TargetedConfig, unadapted_modules


@dataclass
class BitFitConfig(TargetedConfig):
    """How to adapt a model with BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): its biases alone are trained.

    ``target_modules`` are the modules whose biases to train; default all that have one.
    """

    title: ClassVar[str] = "BitFit"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("BITFIT")


class BitFitLayer(AdapterLayer):
    """A module that adds its bias last (linear layer, ``Conv1D``, layer norm), with trained changes of that bias.

    The change, zero at the start, is trained instead of the bias itself: gradients are the same, the base
    model stays as it is, and several adapters can share it.

    Args:
        base_layer: The module with the bias; frozen.
    """

    adapter_layer_names = ("bitfit_bias",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.bitfit_bias = nn.ParameterDict()

    def update_layer(self, adapter_name: str, config: BitFitConfig, trainable: bool) -> None:
        """Attach one adapter: a change of the bias, zero."""
        change = torch.zeros(self.get_base_weight().shape)
        if not config.init_weights:
            nn.init.normal_(change)
        self.bitfit_bias[adapter_name] = nn.Parameter(change, requires_grad=trainable)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _adapted(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        return result + self.bitfit_bias[adapter_name].to(result.dtype)

    def get_base_weight(self) -> torch.Tensor:
        """The bias: what the adapters change."""
        return self.get_base_layer().bias

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Replace the bias."""
        self.get_base_weight().data = weight_data

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The change of the bias."""
        return self.bitfit_bias[adapter_name]


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
            if peft_config.task_type in ("TOKEN_CLS", "QUESTION_ANS"):  # PEFT names their heads only later
                whole |= {"classifier", "score", "qa_outputs"}
            peft_config.target_modules = {
                name
                for name, module in unadapted_modules(model)
                if _has_bias(module) and not whole & set(name.split("."))
            }  # fmt: skip
            if not peft_config.target_modules:
                raise ValueError("BitFit trains biases, and this model has none; choose another method")

    def _layer(self, target: nn.Module, base_layer: nn.Module, name: str) -> BitFitLayer:
        if not _has_bias(base_layer):
            raise ValueError(
                f"the target module '{name}' is a {type(base_layer).__name__} without a bias; BitFit "
                "trains those of linear layers and layer norms: change target_modules or exclude_modules"
            )
        return BitFitLayer(target)


def _has_bias(module: nn.Module) -> bool:
    """Whether a module adds a bias to its output, last."""
    return isinstance(module, (nn.Linear, nn.LayerNorm, Conv1D)) and module.bias is not None


register_peft_method(name="bitfit", config_cls=BitFitConfig, model_cls=BitFitModel)
