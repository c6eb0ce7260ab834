"""A model while it is measured: no dropout, nothing frozen thaws, and everything is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def differentiated(model: nn.Module) -> Iterator[None]:
    """For the length of a ``with``: gradients flow through the model and stay in no parameter.

    Dropout is off. Layers that compute their activations twice (gradient checkpointing) go on to do so.
    """
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as undo:
        undo.callback(_as_before, training, trained)
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
        for layer in layers:
            undo.enter_context(_checkpointed_without_dropout(layer))
        if layers:
            undo.enter_context(_with_gradients_from_the_first_layer(model))
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        yield


def _as_before(training: list[nn.Module], trained: list[nn.Parameter]) -> None:
    for module in training:
        module.training = True
    for parameter in trained:
        parameter.requires_grad_(True)


@contextmanager
def _checkpointed_without_dropout(layer: Any) -> Iterator[None]:
    """Layers checkpoint only in training, and many apply their dropout by the same switch: off where they compute."""
    own = vars(layer).get("_gradient_checkpointing_func")
    checkpoint = layer._gradient_checkpointing_func

    def evaluated(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def compute(*inputs: Any, **others: Any) -> Any:
            layer.training = False
            try:
                return forward(*inputs, **others)
            finally:
                layer.training = True

        return checkpoint(compute, *args, **kwargs)

    layer._gradient_checkpointing_func, layer.training = evaluated, True
    try:
        yield
    finally:
        layer.training = False
        if own is None:
            del layer._gradient_checkpointing_func
        else:
            layer._gradient_checkpointing_func = own


@contextmanager
def _with_gradients_from_the_first_layer(model: Any) -> Iterator[None]:
    """Reentrant checkpoints give no gradient to what is inside unless their input has one."""

    def begin(module: nn.Module, inputs: object, output: Any) -> None:
        output.requires_grad_(True)

    try:
        hook = model.get_input_embeddings().register_forward_hook(begin)
    except (AttributeError, NotImplementedError):  # no embeddings, or a model that does not tell
        yield
        return
    try:
        yield
    finally:
        hook.remove()
