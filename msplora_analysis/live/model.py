"""The adapters of a model in memory, as the same tensor files and configs that saving it would write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import FloatArray, TensorFile

if TYPE_CHECKING:
    import torch

_NOT_WHOLE = "the spectra of what is spread over processes cannot be computed while it trains; analyse its checkpoints"


class ModelTensors(TensorFile):
    """Tensors of a model. Each is brought to the CPU when it is read first, and kept."""

    def __init__(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.path, self.metadata = Path(f"adapter {name}"), {}  # of no file: what messages call it
        self.shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        self._tensors = tensors
        self._arrays: dict[str, FloatArray] = {}

    def __exit__(self, *_: object) -> None:
        self._arrays.clear()

    def tensor(self, name: str) -> torch.Tensor:
        """The torch tensor itself, where it is, cut off from the computation of gradients."""
        return self._tensors[name].detach()

    def read(self, name: str) -> FloatArray:
        if name not in self._arrays:
            tensor = self.tensor(name)
            if tensor.is_floating_point() and tensor.element_size() < 4:  # numpy has no bfloat16
                tensor = tensor.float()
            array: FloatArray = tensor.cpu().numpy()
            self._arrays[name] = array
        return self._arrays[name]


class ModelAdapter(NamedTuple):
    """An adapter of a model: its name, its configuration as adapter_config.json holds it, and its tensors."""

    name: str
    config: dict[str, Any]
    tensors: ModelTensors


def active_adapters(model: Any) -> list[ModelAdapter]:
    """The adapters that act in a model of PEFT, or in one of transformers with ``add_adapter``.

    Nothing is copied yet, and nothing is gathered from other processes.

    Raises:
        AnalysisError: For a model without adapters, and for adapters that this process does not hold as a whole.
    """
    from peft import get_peft_model_state_dict

    model = getattr(model, "module", model) if not hasattr(model, "peft_config") else model
    if not getattr(model, "peft_config", None):
        raise AnalysisError(
            f"the model ({type(model).__name__}) has no PEFT adapter; give Trainer a model that has one"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise AnalysisError(f"the model is sharded by FSDP: {_NOT_WHOLE}")
    # Not state_dict(), which copies what quantised layers hold.
    everything = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    found = []
    active = model.active_adapters  # a method in transformers' models, a property in PEFT's
    for name in dict.fromkeys(active() if callable(active) else active):
        # Anything but False may ask the model hub about the embeddings.
        tensors = get_peft_model_state_dict(
            model, state_dict=everything, adapter_name=name, save_embedding_layers=False
        )
        for key, tensor in tensors.items():
            if reason := _elsewhere(tensor):
                raise AnalysisError(f"adapter {name}: tensor {key} {reason}: {_NOT_WHOLE}")
        config = json.loads(json.dumps(model.peft_config[name].to_dict(), default=_plain))
        found.append(ModelAdapter(name, config, ModelTensors(name, tensors)))
    return found


def _elsewhere(tensor: torch.Tensor) -> str | None:
    """Why this process does not hold all values of a tensor, if so."""
    if hasattr(tensor, "ds_id"):
        return "is sharded by DeepSpeed ZeRO-3"
    if hasattr(tensor, "placements"):  # torch's DTensor
        return "is sharded (a DTensor: FSDP2 or tensor parallelism)"
    if tensor.is_meta:
        return "is on the meta device, offloaded"
    return "is empty, so sharded" if tensor.numel() == 0 else None


def _plain(value: Any) -> Any:
    """Sets as lists, as PEFT saves them; what JSON cannot hold (a dtype, say) by its name."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)
