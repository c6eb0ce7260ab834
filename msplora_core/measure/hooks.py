"""Where a layer's A x and Bᵀ g can be had, for every kind of low-rank layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant, DoraLinearVariant
from torch import nn
from torch.nn.functional import embedding, linear
from torch.nn.modules.conv import _ConvNd

from msplora_core.errors import TrainingError
from msplora_core.measure.updates import Update
from msplora_core.tuners.msplora.layer import MSPLoraLinear
from msplora_core.tuners.sora import SoraLinear

_DORA = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)

Took = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes A x of some rows, (..., R), and the gradient there, Bᵀ g."""


def notes(updates: Iterable[Update]) -> list[str]:
    """What a reader of their moments must know."""
    if not any(isinstance(getattr(one.layer, "lora_variant", {}).get(one.adapter), _DORA) for one in updates):
        return []
    return ["DoRA: moments of its low-rank part, B A; the magnitudes that rescale it count as part of the gradient"]


def hooked(update: Update, take: Took) -> Any:
    """Have ``take`` called with A x and Bᵀ g of every forward pass of a module, once its gradient is known.

    Returns:
        The hook, to remove.
    """
    layer: Any = update.layer
    adapter = update.adapter
    if isinstance(layer, MSPLoraLinear):
        return layer.hidden.register_forward_hook(partial(_inside, take))
    if isinstance(update.layer, (AdaLoraLayer, SoraLinear)):
        a, b = update.a(), update.b()
        return layer.register_forward_hook(partial(_outside, take, lambda x: linear(x.to(a.dtype), a), b))
    variant = layer.lora_variant.get(adapter)
    if isinstance(layer, lora.Embedding) and variant is None:
        a, b = update.a(), update.b()
        scale = layer._get_embed_scale()
        return layer.register_forward_hook(
            partial(_outside, take, lambda ids: embedding(ids, a.T), b if scale is None else b * scale)
        )
    if isinstance(layer, (lora.Embedding, lora.MultiheadAttention)) or not isinstance(variant, (type(None), *_DORA)):
        kind = type(layer).__name__ if variant is None else type(variant).__name__
        raise TrainingError(f"{update.name}: {kind} cannot be measured; leave the module out of the adapter")
    return layer.lora_A[adapter].register_forward_hook(partial(_inside, take))


def beside(name: str, layer: nn.Module, a: torch.Tensor, b: torch.Tensor, take: Took) -> Any:
    """Have ``take`` called with A x and Bᵀ g of an update that a linear module does not apply; see ``hooked``.

    Args:
        name: The module's, for the error.
        layer: The module, with an adapter of its own or without.
        a: (R, in). ``b``: (out, R).
    """

    def down(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point() or x.shape[-1] != a.shape[1]:
            raise TrainingError(f"{name}: an update of {len(b)} × {a.shape[1]} does not fit; expected linear modules")
        return linear(x.to(a.dtype), a)

    return layer.register_forward_hook(partial(_outside, take, down, b))


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, where the device has it."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _inside(take: Took, module: nn.Module, inputs: object, hidden: torch.Tensor) -> None:
    """A hook where a layer computes A x."""
    if torch.is_grad_enabled():  # not in the first pass of a reentrant checkpoint
        if not hidden.requires_grad:
            hidden.requires_grad_(True)  # the first adapted modules: gradients need not flow further
        seen = hidden.detach()
        hidden.register_hook(lambda gradient: take(_features_last(seen, module), _features_last(gradient, module)))


def _outside(
    take: Took,
    down: Callable[[torch.Tensor], torch.Tensor],
    b: torch.Tensor,
    module: nn.Module,
    inputs: Any,
    output: Any,
) -> torch.Tensor | None:
    """A hook at a layer that does not compute A x by itself: ``down`` does."""
    if not torch.is_grad_enabled():
        return None
    with torch.no_grad():
        seen = down(inputs[0])
    if not output.requires_grad:
        output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
    output.register_hook(lambda gradient: take(seen, gradient.to(b.dtype) @ b))
    return output


def _features_last(rows: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """(..., R); a convolution has its features before the places where it is applied."""
    return rows.flatten(2).transpose(1, 2) if isinstance(module, _ConvNd) else rows
