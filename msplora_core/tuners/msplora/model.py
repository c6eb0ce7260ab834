"""The PEFT tuner of MSPLoRA: its layers, the model that holds them, and files with every shared tensor once."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features, _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import QuantizationBackend, get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from msplora_core.names import SCALES
from msplora_core.tuners.msplora.config import MSPLoraConfig
from msplora_core.tuners.msplora.pyramid import assign_owners
from msplora_core.tuners.strict import AdapterLayer, StrictTuner, register, unadapted_modules


class LowRankPair(nn.Module):
    """One pair of factors: A (rank, in_features), Kaiming uniform; B (out_features, rank), zero.

    A shared pair is one object held by many layers, so it exists once in memory, whatever moves,
    casts or loads it.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as LoRA initialises its A


class MSPLoraLinear(AdapterLayer):
    """A linear layer (``nn.Linear``, transformers' ``Conv1D``, or a quantised one) with MSPLoRA adapters.

    Args:
        base_layer: The layer to adapt; frozen.
        quantization_backend: PEFT's access to a quantised weight, or None.
    """

    adapter_layer_names = ("msplora_global", "msplora_mid", "msplora_layer")
    other_param_names = ("scaling", "msplora_dropout")

    def __init__(self, base_layer: nn.Module, quantization_backend: QuantizationBackend | None = None) -> None:
        super().__init__(base_layer)
        self.quantization_backend = quantization_backend
        features: Any = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = features
        self.msplora_global = nn.ModuleDict()
        self.msplora_mid = nn.ModuleDict()
        self.msplora_layer = nn.ModuleDict()
        self.msplora_dropout = nn.ModuleDict()
        self.scaling: dict[str, dict[str, float]] = {}

    def pairs(self, scale: str) -> Any:
        """The pairs of one scale, by adapter name."""
        return getattr(self, f"msplora_{scale}")

    def add_adapter(
        self, adapter_name: str, pairs: dict[str, LowRankPair], scaling: dict[str, float], dropout: float
    ) -> None:
        """Attach one adapter: a pair (its own or another layer's) and a scaling for every scale."""
        for scale, pair in pairs.items():
            self.pairs(scale)[adapter_name] = pair
        self.scaling[adapter_name] = scaling
        self.msplora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def concatenated_factors(self, adapter_name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All scales as one pair: A (R, in_features) and scaled B (out_features, R), R the sum of ranks.

        The sum of the scales' products is the product of the concatenations, so the layer costs two
        matrix products however many scales there are.
        """
        scaling = self.scaling[adapter_name]
        pairs = {scale: self.pairs(scale)[adapter_name] for scale in SCALES if scale in scaling}
        # A shared pair lives on one device; with the model spread over several, the others read it from there.
        A = torch.cat([pair.A.to(device) for pair in pairs.values()])
        B = torch.cat([pair.B.to(device) * scaling[scale] for scale, pair in pairs.items()], dim=1)
        return A, B

    def _adapted(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        A, B = self.concatenated_factors(adapter_name, x.device)
        inputs = self.msplora_dropout[adapter_name](self._cast_input_dtype(x, A.dtype))
        return result + F.linear(F.linear(inputs, A), B)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The update dW in the base weight's own layout: (out, in), for ``Conv1D`` (in, out)."""
        base_layer: Any = self.get_base_layer()
        A, B = self.concatenated_factors(adapter_name, base_layer.weight.device)
        delta = B.float() @ A.float()  # half precision products are slow or missing on some processors
        return delta.T if isinstance(base_layer, Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Yes: the update is a low-rank product."""
        return True


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
