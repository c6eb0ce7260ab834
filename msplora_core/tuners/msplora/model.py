"""The PEFT tuner of MSPLoRA: who shares with whom, and files with every shared tensor once."""

import warnings
from typing import Any

from peft.tuners.tuners_utils import _get_in_out_features, _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..strict import StrictTuner, unadapted_modules
from .config import MSPLoraConfig
from .layer import LowRankPair, MSPLoraLinear
from .pyramid import assign_owners, is_numbered


class MSPLoraModel(StrictTuner):
    """A model adapted with MSPLoRA (arXiv 2503.21838); made by ``peft.get_peft_model``.

    Each shared pair is one object: a part of the first layer that uses it, to which the others refer. So it stands once
    in state dicts and files, under that layer: ``<module>.msplora_global.A``, ``<module>.msplora_mid.B`` and so on.
    """

    prefix = "msplora_"
    tuner_layer_cls = MSPLoraLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Decide who shares with whom, and raise every error about targets before any module is replaced."""
        if self.named_in_file is not None and "layer" not in peft_config.scale_ranks():
            raise ValueError(
                "without the scale 'layer', a state dict does not name every module that shares its tensors: inject "
                "the adapter without state_dict, by target_modules, and load the tensors with set_peft_model_state_dict"
            )
        by_name = peft_config.target_modules
        _maybe_include_all_linear_layers(peft_config, model)
        if peft_config.target_modules is not by_name:
            _leave_out_unnumbered(peft_config)
        shapes: dict[str, tuple[int, int]] = {}
        for name, base_layer in unadapted_modules(model):
            if not self._is_target(peft_config, name):
                continue
            if not isinstance(base_layer, (nn.Linear, Conv1D)) and self._quantization_backend(base_layer) is None:
                raise ValueError(
                    f"the target module '{name}' is a {type(base_layer).__name__}; MSPLoRA adapts nn.Linear, "
                    "transformers' Conv1D and quantised linear layers: change target_modules or exclude_modules"
                )
            in_features, out_features = _get_in_out_features(base_layer)
            if in_features is None or out_features is None:
                raise ValueError(f"the sizes of the target module '{name}' ({type(base_layer).__name__}) are unknown")
            for scale, rank in peft_config.scale_ranks().items():
                if rank > min(in_features, out_features):
                    raise ValueError(
                        f"the rank {rank} of the scale '{scale}' is above the smaller side of '{name}' "
                        f"({out_features} x {in_features}); lower r or ranks, or leave the module out"
                    )
            shapes[name] = out_features, in_features
        self._owners = assign_owners(shapes, peft_config.mid_groups)

    def _quantization_backend(self, base_layer: nn.Module) -> Any:
        return resolve_quantization_backend(base_layer, **get_quantization_kwargs(self.model))

    def _layer(self, target: nn.Module, base_layer: nn.Module, name: str) -> MSPLoraLinear:
        return MSPLoraLinear(target, self._quantization_backend(target))

    def _update_layer(
        self, layer: MSPLoraLinear, adapter_name: str, config: MSPLoraConfig, name: str, trainable: bool
    ) -> None:
        shared: dict[str, LowRankPair] = {
            scale: self.model.get_submodule(self._owners[name][scale]).pairs(scale)[adapter_name]
            for scale in config.scale_ranks()
            if self._owners[name][scale] != name
        }
        layer.update_layer(adapter_name, config, trainable, shared)


def _leave_out_unnumbered(config: Any) -> None:
    """Take out of all linear layers those in no numbered layer, such as a pooler: nothing shares with them."""
    left_out = {name for name in config.target_modules if not is_numbered(name)}
    if left_out:
        config.target_modules = config.target_modules - left_out
        warnings.warn(
            f"'all-linear' leaves out what stands in no numbered layer: {', '.join(sorted(left_out))}", stacklevel=2
        )
