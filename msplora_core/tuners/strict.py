"""What our PEFT tuners share: their place in PEFT's tables, targets, layers, and loading that misses no tensor.

PEFT loads leniently: a missing tensor would stay at its initial value, silently.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn


@dataclass
class TargetedConfig(PeftConfig):
    """A configuration that says which modules to adapt.

    Args:
        target_modules: Names of the modules to adapt, as in ``LoraConfig``: a list of name endings, or a regular
            expression. Every method has a default of its own.
        exclude_modules: Modules to leave out although ``target_modules`` matches them.
        modules_to_save: Modules trained in full and saved with the adapter, such as a task's head.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):  # as every PEFT method
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A module with adapters, of which the active ones change its output.

    Args:
        base_layer: The module to adapt; frozen.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What merging an adapter adds to the parameter that :meth:`get_base_weight` gives."""
        raise NotImplementedError

    def _adapted(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The output of the base module and of the adapters before, with one adapter more; x is the input."""
        raise NotImplementedError

    def _has(self, adapter_name: str) -> bool:
        """Whether an adapter is of this module, and not of others only."""
        return any(adapter_name in getattr(self, parts) for parts in self.adapter_layer_names)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base module's output with the active adapters; x is (..., in_features)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter_name in filter(self._has, self.active_adapters):
            result = self._adapted(result, x, adapter_name)
        return result.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base module.

        Args:
            safe_merge: Leave the module alone and raise if the result is not finite.
            adapter_names: Which adapters; default the active ones.

        Raises:
            ValueError: with safe_merge, an update that is not finite.
        """
        for adapter_name in filter(self._has, check_adapters_to_merge(self, adapter_names)):
            weight = self.get_base_weight()
            merged = (weight.float() + self.get_delta_weight(adapter_name)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging the adapter '{adapter_name}' gives weights that are not finite")
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Take the merged updates out of the base module again."""
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to unmerge", stacklevel=2)
        while self.merged_adapters:
            weight = self.get_base_weight()
            delta = self.get_delta_weight(self.merged_adapters.pop())
            self.set_base_weight((weight.float() - delta).to(weight.dtype))


class StrictTuner(BaseTuner):
    """A PEFT tuner whose adapter file must hold every tensor of the adapter, and no other."""

    def _layer(self, target: nn.Module, base_layer: nn.Module, name: str) -> AdapterLayer:
        """A layer that adapts ``target``, called ``name``: ``base_layer``, or another method's layer around that."""
        raise NotImplementedError

    def _add_adapter(self, layer: Any, adapter_name: str, config: Any, name: str, trainable: bool) -> None:
        """Attach an adapter to a layer made by :meth:`_layer`."""
        layer.add_adapter(adapter_name, config, trainable)

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
        layer: Any = target
        if not isinstance(target, self.tuner_layer_cls):
            base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            layer = self._layer(target, base_layer, current_key)
        # a further adapter is not trained before set_adapter makes it the active one
        self._add_adapter(layer, adapter_name, peft_config, current_key, adapter_name in self.active_adapters)
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = set(cls._adapter_keys(model, adapter_name))
        missing = sorted(expected - remapped.keys())
        known = {key for key in model.state_dict() if f".{cls.prefix}" not in key} | expected
        extra = sorted(remapped.keys() - known)
        if missing or extra:
            raise ValueError(
                f"the adapter's file does not fit the model: {_listing(missing)} missing, {_listing(extra)} extra; "
                "was it made for another base model, other target_modules or other ranks?"
            )
        return remapped

    @classmethod
    def _adapter_keys(cls, model: nn.Module, adapter_name: str) -> Iterator[str]:
        """State-dict keys of the adapter's tensors."""
        for module_name, module in model.named_modules():
            if isinstance(module, cls.tuner_layer_cls):
                for attribute in module.adapter_layer_names:
                    # a ModuleDict or ParameterDict by adapter name
                    for key in getattr(module, attribute).state_dict():
                        if key == adapter_name or key.startswith(f"{adapter_name}."):
                            yield f"{module_name}.{attribute}.{key}"


def register(config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Make a method known to PEFT: its enumeration of methods is closed, but its tables take a plain string."""
    key: Any = config.peft_type
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = tuner.prefix


def unadapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model as if it had no adapters: a layer that has some stands for its base layer."""
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if adapted and name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted += (f"{name}.",)
            yield name, module.get_base_layer()
        else:
            yield name, module


def _listing(keys: list[str], most: int = 3) -> str:
    if not keys:
        return "none"
    return f"{len(keys)} ({', '.join(keys[:most])}{', ...' if len(keys) > most else ''})"
