"""What our PEFT tuners share: targets, layers, batches of several adapters, and loading that misses no tensor.

PEFT loads leniently: a missing tensor would stay at its initial value, silently.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


@dataclass
class TargetedConfig(PeftConfig):
    """A configuration that says which modules to adapt.

    Args:
        target_modules: Names of the modules to adapt, as in ``LoraConfig``: a list of name endings, or a regular
            expression. Every method has a default of its own.
        exclude_modules: Modules to leave out although ``target_modules`` matches them.
        modules_to_save: Modules trained in full and saved with the adapter, such as a task's head.
        init_weights: Start as the base model, the default; False starts from random values, for tests.
    """

    title: ClassVar[str]
    """How the method is written in text."""

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):  # as every PEFT method
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and how to load the adapter into README.md: PEFT alone does not know it."""
        super().save_pretrained(save_directory, **kwargs)
        readme = Path(save_directory, "README.md")
        text = readme.read_text(encoding="utf-8").rstrip() + "\n" if readme.exists() else ""
        if "import msplora_core" not in text:
            readme.write_text(f"{text}{_HOW_TO_LOAD.format(self)}", encoding="utf-8")


_HOW_TO_LOAD = """
## How to load this {0.title} adapter

PEFT knows {0.title} once `msplora_core` of the package msplora is imported:

```python
import msplora_core
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")
```

Without it, loading fails with `KeyError: '{0.peft_type.value}'`.
"""


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A module with adapters, of which the active ones change its output.

    Args:
        base_layer: The module to adapt; frozen.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        # numbers, or None of a layer that PEFT does not know: what cannot be adapted, a tuner refuses
        with warnings.catch_warnings(action="ignore"):
            features: Any = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = features

    def update_layer(self, adapter_name: str, config: Any, trainable: bool) -> None:
        """Attach one adapter."""
        raise NotImplementedError

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What merging an adapter adds to the parameter that :meth:`get_base_weight` gives."""
        raise NotImplementedError

    def _adapted(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The output of the base module and of the adapters before, with one adapter more; x is the input."""
        raise NotImplementedError

    def _has(self, adapter_name: str) -> bool:
        """Whether an adapter is of this module, and not of others only."""
        return any(adapter_name in getattr(self, parts) for parts in self.adapter_layer_names)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The base module's output with the active adapters.

        Args:
            x: Input, (..., in_features).
            adapter_names: The adapter of every row of the batch, instead of the active ones; ``"__base__"`` is none.
        """
        if adapter_names is not None:
            self._check_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if adapter_names is None:
            for adapter_name in filter(self._has, self.active_adapters):
                result = self._adapted(result, x, adapter_name)
            return result.to(dtype)
        for adapter_name in filter(self._has, dict.fromkeys(adapter_names)):
            rows = [row for row, name in enumerate(adapter_names) if name == adapter_name]
            result[rows] = self._adapted(result[rows], x[rows], adapter_name).to(dtype)
        return result

    def _check_names(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

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
            merged = (weight + self.get_delta_weight(adapter_name)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: "
                    "with it, weights are not finite"
                )
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Take the merged updates out of the base module again."""
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to unmerge", stacklevel=2)
        while self.merged_adapters:
            weight = self.get_base_weight()
            delta = self.get_delta_weight(self.merged_adapters.pop())
            self.set_base_weight((weight - delta).to(weight.dtype))

    def _get_name(self) -> str:
        return f"{self.adapter_layer_names[0].partition('_')[0]}.{type(self.get_base_layer()).__name__}"


class StrictTuner(BaseTuner):
    """A PEFT tuner whose adapter file must hold every tensor of the adapter, and no other."""

    named_in_file: set[str] | None = None
    """Modules to adapt because a state dict names them, while an adapter is injected from one."""

    def _layer(self, target: nn.Module, base_layer: nn.Module, name: str) -> AdapterLayer:
        """A layer that adapts ``target``, called ``name``: ``base_layer``, or another method's layer around that."""
        raise NotImplementedError

    def _update_layer(self, layer: Any, adapter_name: str, config: Any, name: str, trainable: bool) -> None:
        """Attach an adapter to a layer made by :meth:`_layer`."""
        layer.update_layer(adapter_name, config, trainable)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Put adapter layers into a model, as PEFT does; ``state_dict`` may name the modules instead of the config."""
        if state_dict is not None:
            self.named_in_file = {unwrapped(key).rpartition(f".{self.prefix}")[0] for key in state_dict} - {""}
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            self.named_in_file = None

    def _is_target(self, config: Any, name: str) -> bool:
        """Whether a module is to be adapted."""
        if self.named_in_file is not None:
            return name in self.named_in_file
        return bool(name and self._check_target_module_exists(config, name))

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
        name = unwrapped(current_key)
        if not isinstance(target, self.tuner_layer_cls):
            base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            layer = self._layer(target, base_layer, name)
        # a further adapter is not trained before set_adapter makes it the active one
        self._update_layer(layer, adapter_name, peft_config, name, adapter_name in self.active_adapters)
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` of a call on to every layer: which adapter each row of the batch is for."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted({*names} - {"__base__", *self.peft_config})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        # Beam search repeats every row; an encoder sees the rows before that.
        repeated = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        encoding = {*encoder.modules()} if isinstance(encoder, nn.Module) and encoder is not self.model else set()
        kinds: Any = (self.tuner_layer_cls, AuxiliaryTrainingWrapper)
        hooks = [
            module.register_forward_pre_hook(
                partial(_with_names, names=names if module in encoding else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, kinds)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not possible here.

        Raises:
            NotImplementedError: always; the message says what to do instead.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot add up adapters into one: make several active at once with "
            "set_adapter([...]), or turn each into a LoRA (peft.convert_to_lora) and use add_weighted_adapter of that"
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        keys = dict.fromkeys(cls._adapter_keys(model, adapter_name))
        tensors = {key: state_dict[key] for key in keys if key in state_dict}
        return tensors | cls._get_learnable_bias_state_dict(model, state_dict, config)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if hasattr(model, "_fsdp_wrapped_module"):  # PEFT would look for names that it has not, and load nothing
            raise ValueError("load the adapter first and wrap the model in FullyShardedDataParallel then")
        renamed: dict[str, str] = {}
        for key in dict.fromkeys(cls._adapter_keys(model, adapter_name)):
            name = unwrapped(cls._remove_adapter_name_from_key(key, adapter_name))
            # a model into which adapters were injected directly has no such prefix, its file has
            renamed |= {name: key, f"base_model.model.{name}": key}
        remapped = {renamed.get(unwrapped(key), key): tensor for key, tensor in state_dict.items()}
        missing = sorted({*renamed.values()} - remapped.keys())
        # a module of the base model may be called like a part of ours
        known = renamed.keys() | model.state_dict().keys()
        extra = sorted(key for key in state_dict if f".{cls.prefix}" in key and unwrapped(key) not in known)
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
                            yield f"{saved(module_name)}.{attribute}.{key}"


def saved(name: str) -> str:
    """A module's name in the state dict, which FSDP and activation checkpointing give without their wrappers."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def unwrapped(name: str) -> str:
    """A module's name without what ``torch.compile`` puts before it."""
    return name.removeprefix("_orig_mod.")


def unadapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model as if it had no adapters: a layer that has some stands for its base layer."""
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if adapted and name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted += (f"{name}.",)
            yield unwrapped(name), module.get_base_layer()
        else:
            yield unwrapped(name), module


def _with_names(module: nn.Module, args: Any, kwargs: Any, *, names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


def _listing(keys: list[str], most: int = 3) -> str:
    if not keys:
        return "none"
    return f"{len(keys)} ({', '.join(keys[:most])}{', ...' if len(keys) > most else ''})"
