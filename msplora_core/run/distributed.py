"""Several processes, as ``torchrun`` and ``accelerate launch`` start them: who writes, who waits, who holds what."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from msplora_core.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn

_T = TypeVar("_T")


def process_index() -> int:
    """The number of this process, from 0, as the launcher tells it."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes train together, as the launcher tells it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_writer() -> bool:
    """Whether this process is the one that writes files and talks."""
    return process_index() == 0


def join() -> None:
    """Meet the other processes: NCCL with GPUs, gloo without. Nothing to do for a single one."""
    if process_count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def by_writer(function: Callable[[], _T]) -> _T:
    """Call ``function`` in the writing process alone; all get its result.

    Raises:
        TrainingError: in every process, if the function raised it.
    """
    if process_count() == 1:
        return function()
    import torch.distributed as dist

    outcome: list[Any] = [None]
    failure = None
    if is_writer():
        try:
            outcome = [function()]
        except TrainingError as error:
            failure = str(error)
    raise_first(failure)
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


def raise_first(failure: str | None) -> None:
    """Tell all processes of a failure in any.

    Raises:
        TrainingError: in every process, with the message of the first that has one.
    """
    from accelerate.utils import gather_object

    for message in gather_object([failure]) if process_count() > 1 else [failure]:
        if message is not None:
            raise TrainingError(message)


def leave() -> None:
    """Part from the other processes at the end of a run."""
    if process_count() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def shard_frozen(model: nn.Module) -> None:
    """Spread a model's frozen parameters over all processes with FSDP2; what is trained stays whole in each.

    Each process keeps its part of every transformer layer and gathers a layer only while it computes it.
    The trained parameters are left alone because MSPLoRA's are shared by layers, which FSDP2 would put
    into several groups: DistributedDataParallel averages their gradients, of each once.

    Raises:
        TrainingError: there is one process, or the model tells no layers to split at.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if process_count() == 1:
        raise TrainingError("shard_base=True spreads the base model over processes; start several with torchrun")
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    trained = {p for p in model.parameters() if p.requires_grad}
    frozen = set(model.parameters()) - trained
    if not frozen:
        raise TrainingError(
            "shard_base=True spreads what is not trained; with full fine-tuning, nothing is left to spread"
        )
    if not all(p.is_floating_point() for p in frozen):
        raise TrainingError("shard_base=True: a quantised base model cannot be spread over processes")
    layer_classes = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in layer_classes]
    if not layers:
        raise TrainingError(
            f"shard_base=True: {type(base).__name__} does not say which modules are its layers (_no_split_modules); "
            "train it without 'shard_base'"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (process_count(),))
    for module in (*layers, base):
        # Always, the root too: else one that saves alone is in another state than the others, and they wait for ever.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    if device == "cuda":
        for parameter in trained:
            parameter.data = parameter.data.to(torch.device("cuda", torch.cuda.current_device()))


def replicate_trained(model: nn.Module) -> nn.Module:
    """Wrap a model after :func:`shard_frozen`: gradients of the trained parameters are averaged over processes."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    frozen = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
    device_ids = [torch.cuda.current_device()] if torch.cuda.is_available() else None
    return DistributedDataParallel(model, device_ids=device_ids)
