"""The low-rank updates inside a PEFT model: their factors, and another update in their place for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from msplora_core.errors import TrainingError
from msplora_core.moments import Array
from msplora_core.names import SCALES
from msplora_core.tuners.msplora.layer import MSPLoraLinear
from msplora_core.tuners.sora import SoraLinear

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Part:
    """One scale's factors: ``a`` (rank, in) and ``b`` (out, rank), which its scaling still multiplies."""

    scale: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Update:
    """The update of one adapted module: ΔW = B A, the factors of its scales side by side; R is the sum of their ranks.

    Attributes:
        name: Dotted path in the base model.
        layer: The module that PEFT put there.
        adapter: Its adapter's name.
        parts: One for each scale; LoRA has one alone, ``layer``. Parts of several updates may share their tensors.
    """

    name: str
    layer: Any
    adapter: str
    parts: tuple[Part, ...]

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(part.scale for part in self.parts)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(part.rank for part in self.parts)

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    @property
    def sides(self) -> int:
        """Parameters of a direction: in + out."""
        return self.parts[0].a.shape[1] + self.parts[0].b.shape[0]

    def columns(self, scale: str) -> range:
        """Where a scale stands among the R."""
        start = sum(part.rank for part in self.parts[: self.scales.index(scale)])
        return range(start, start + self.parts[self.scales.index(scale)].rank)

    def a(self) -> torch.Tensor:
        """A, (R, in), float32 or wider, on the device of the module."""
        return torch.cat([_wide(part.a).to(self._device) for part in self.parts])

    def b(self) -> torch.Tensor:
        """B with its scalings, (out, R), likewise."""
        return torch.cat([_wide(part.b).to(self._device) * part.scaling for part in self.parts], dim=1)

    def tensor(self, core: Array) -> torch.Tensor:
        """A matrix, (R, R), as :meth:`set` takes it."""
        return torch.from_numpy(core).to(self._device, torch.promote_types(self.parts[0].b.dtype, torch.float32))

    def grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A Aᵀ and Bᵀ B, (R, R) float64 each, on the processor."""
        a, b = self.a().double(), self.b().double()
        return (a @ a.T).cpu(), (b.T @ b).cpu()

    @property
    def _device(self) -> torch.device:
        # a pair that several devices share lives on one of them
        weight = getattr(self.layer.get_base_layer(), "weight", None)  # some quantised layers have none of that name
        return self.parts[0].b.device if weight is None else weight.device

    def set(self, core: torch.Tensor) -> None:
        """Put B core A in the place of B A, in this module alone; ``core``: (R, R), on the module's device."""
        if isinstance(self.layer, MSPLoraLinear):
            dtype = self.parts[0].a.dtype
            a, b = self.a().to(dtype), (self.b() @ core).to(dtype)
            self.layer.__dict__["concatenated_factors"] = lambda adapter_name, device: (a, b)
        else:
            (part,), b = self.parts, _factors(self.layer, self.adapter)[1]
            b.data = (_wide(part.b) @ core).to(part.b.dtype).reshape(b.shape)

    def restore(self) -> None:
        """Put B A back, the very tensors that were there."""
        if isinstance(self.layer, MSPLoraLinear):
            self.layer.__dict__.pop("concatenated_factors", None)
        else:
            b = _factors(self.layer, self.adapter)[1]
            b.data = self.parts[0].b.view(b.shape)


def updates_of(model: nn.Module) -> dict[str, Update]:
    """The updates of a PEFT model's active adapter, by the dotted path of their modules.

    LoRA and what its layers hold (rsLoRA, PiSSA, DoRA, quantised bases), AdaLoRA, SoRA and MSPLoRA.

    Args:
        model: What ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` gives.

    Raises:
        TrainingError: there is no such update, several adapters are active, one is merged, or a module's adapter is of
            another kind.
    """
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            name = name.removeprefix(_PREFIX)
            if len(layer.active_adapters) != 1 or layer.merged or layer.disable_adapters:
                raise TrainingError(f"{name}: expected one active adapter that is not merged; set_adapter chooses one")
            (adapter,) = layer.active_adapters
            if parts := _parts(name, layer, adapter):
                found[name] = Update(name, layer, adapter, parts)
    if not found:
        raise TrainingError("the model has no low-rank adapter; expected LoRA, AdaLoRA, SoRA or MSPLoRA")
    return found


def _parts(name: str, layer: Any, adapter: str) -> tuple[Part, ...]:
    if isinstance(layer, MSPLoraLinear):
        scalings = layer.scaling.get(adapter, {})
        pairs = {scale: layer.pairs(scale)[adapter] for scale in SCALES if scale in scalings}
        return tuple(Part(scale, pair.A.data, pair.B.data, scalings[scale]) for scale, pair in pairs.items())
    if isinstance(layer, AdaLoraLayer):
        if adapter not in layer.lora_A:
            return ()
        a, b = layer.lora_A[adapter] * layer.lora_E[adapter], layer.lora_B[adapter]
        # the very sum that PEFT divides by
        return (Part("layer", a.data, b.data, layer.scaling[adapter] / (float(layer.ranknum[adapter]) + 1e-5)),)
    if isinstance(layer, SoraLinear):
        if adapter not in layer.sora_pair:
            return ()
        pair: Any = layer.sora_pair[adapter]
        a, b = _factors(layer, adapter)
        return (Part("layer", (a * pair.gate.T).data, b.data, pair.scaling),)
    if isinstance(layer, LoraLayer):
        if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
            return ()
        kinds = {type(factors[adapter]) for factors in (layer.lora_A, layer.lora_B) if adapter in factors}
        a, b = (factor.data.flatten(1) for factor in _factors(layer, adapter))
        fits = a.shape[0] == b.shape[1]  # not so of a convolution in groups
        if fits and kinds <= {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d} and not isinstance(layer, ParamWrapper):
            return (Part("layer", a, b, layer.scaling[adapter]),)
    raise TrainingError(
        f"{name}: {type(layer).__name__} cannot be measured; expected modules with LoRA, AdaLoRA, SoRA or MSPLoRA"
    )


@contextmanager
def evaluating(model: nn.Module, updates: Mapping[str, Update]) -> Iterator[None]:
    """For the length of a ``with``: evaluation without gradients; then everything is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for update in updates.values():
            update.restore()
        for module in training:
            module.training = True


def _factors(layer: Any, adapter: str) -> tuple[Any, Any]:
    """The parameters A and B of a layer of LoRA, AdaLoRA or SoRA; those of a convolution have four dimensions."""
    if isinstance(layer, SoraLinear):
        gated: Any = layer.sora_pair[adapter]
        return gated.lora_A, gated.lora_B
    if adapter not in layer.lora_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    pair = layer.lora_A[adapter], layer.lora_B[adapter]
    a, b = (factor.weight if isinstance(factor, nn.Module) else factor for factor in pair)
    return a, b


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
