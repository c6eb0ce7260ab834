"""The PEFT tuner of MSPLoRA: who shares with whom, and files with every shared tensor once."""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features, _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from msplora_core.tuners.msplora.config import MSPLoraConfig
from msplora_core.tuners.msplora.layer import LowRankPair, MSPLoraLinear
from msplora_core.tuners.msplora.pyramid import assign_owners
from msplora_core.tuners.strict import StrictTuner, register, unadapted_modules


class MSPLoraModel(StrictTuner):
    """A model adapted with MSPLoRA (arXiv 2503.21838); made by ``peft.get_peft_model``.

    Each shared pair is one object, held by every layer that uses it. In an adapter file it stands once,
    under the first of these layers: ``<module>.msplora_global.A``, ``<module>.msplora_mid.B`` and so on.
    """

    prefix = "msplora_"
    tuner_layer_cls = MSPLoraLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Decide who shares with whom, and raise every error about targets before any module is replaced."""
        _maybe_include_all_linear_layers(peft_config, model)
        shapes: dict[str, tuple[int, int]] = {}
        for name, base_layer in unadapted_modules(model):
            if not name or not self._check_target_module_exists(peft_config, name):
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

    def _add_adapter(
        self, layer: MSPLoraLinear, adapter_name: str, config: MSPLoraConfig, name: str, trainable: bool
    ) -> None:
        pairs: dict[str, LowRankPair] = {}
        for scale, rank in config.scale_ranks().items():
            owner = self._owners[name][scale]
            if owner == name:
                pairs[scale] = LowRankPair(layer.in_features, layer.out_features, rank).requires_grad_(trainable)
            else:
                pairs[scale] = self.model.get_submodule(owner).pairs(scale)[adapter_name]
        layer.add_adapter(adapter_name, pairs, config.scale_scalings(), config.lora_dropout)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        aliases = _keys_of_pairs(model, adapter_name)
        return {key: tensor for key, tensor in tensors.items() if aliases.get(key, key) == key}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for key, owner_key in _keys_of_pairs(model, adapter_name).items():
            remapped[key] = remapped[owner_key]
        return remapped

    @classmethod
    def _adapter_keys(cls, model: nn.Module, adapter_name: str) -> Iterator[str]:
        return iter(_keys_of_pairs(model, adapter_name).values())


def _keys_of_pairs(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Map every state-dict key of a pair's tensor to the key under which it is saved, its first one."""
    first_keys: dict[int, str] = {}
    keys: dict[str, str] = {}
    for module_name, module in model.named_modules():
        if not isinstance(module, MSPLoraLinear):
            continue
        for attribute in module.adapter_layer_names:
            pairs = getattr(module, attribute)
            if adapter_name in pairs:
                key = f"{module_name}.{attribute}.{adapter_name}"
                first_key = first_keys.setdefault(id(pairs[adapter_name]), key)
                keys.update({f"{key}.{factor}": f"{first_key}.{factor}" for factor in ("A", "B")})
    return keys


register(MSPLoraConfig, MSPLoraModel)
