"""The layers of MSPLoRA: a pair of factors, and a linear layer that adds those of its scales."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..strict import AdapterLayer
from .config import SCALES, MSPLoraConfig

_SHARDED = (
    "the pair of the scale '{}' is a part of an earlier layer, of which this process has a shard only: let FSDP keep "
    "gathered layers until the backward pass is over (shard_grad_op, or fully_shard with reshard_after_forward=False), "
    "or wrap the model as a whole"
)


class LowRankPair(nn.Module):
    """One pair of factors: A (rank, in_features), Kaiming uniform; B (out_features, rank), zero or as A.

    A shared pair is one object that many layers use, so it exists once in memory, whatever moves,
    casts or loads it.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, zero: bool = True) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as LoRA initialises its A
        if not zero:
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))


class MSPLoraLinear(AdapterLayer):
    """A linear layer (``nn.Linear``, transformers' ``Conv1D``, or a quantised one) with MSPLoRA adapters.

    Args:
        base_layer: The layer to adapt; frozen.
        quantization_backend: PEFT's access to a quantised weight, or None.
    """

    adapter_layer_names = ("msplora_global", "msplora_mid", "msplora_layer")
    other_param_names = ("scaling", "msplora_dropout", "shared")

    def __init__(self, base_layer: nn.Module, quantization_backend: QuantizationBackend | None = None) -> None:
        super().__init__(base_layer)
        self.quantization_backend = quantization_backend
        self.msplora_global = nn.ModuleDict()
        self.msplora_mid = nn.ModuleDict()
        self.msplora_layer = nn.ModuleDict()
        self.msplora_dropout = nn.ModuleDict()
        self.scaling: dict[str, dict[str, float]] = {}
        self.hidden = nn.Identity()
        """Gives A x back as it is: a place for hooks, as LoRA's modules have."""
        self.shared: dict[str, dict[str, LowRankPair]] = {}
        """By adapter and scale, the pairs of earlier layers: in a plain dict, since they are no parts of this one."""

    def pairs(self, scale: str) -> dict[str, LowRankPair]:
        """The pairs of one scale, by adapter name: those that are here, and those of an earlier layer."""
        return {**getattr(self, f"msplora_{scale}")} | {
            adapter_name: pairs[scale] for adapter_name, pairs in self.shared.items() if scale in pairs
        }

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, config: MSPLoraConfig, trainable: bool, shared: dict[str, LowRankPair]
    ) -> None:
        """Attach one adapter; ``shared`` has the pairs of earlier layers, by scale, and the others are made here."""
        for scale, rank in config.scale_ranks().items():
            if scale not in shared:
                pair = LowRankPair(self.in_features, self.out_features, rank, zero=config.init_weights)
                getattr(self, f"msplora_{scale}")[adapter_name] = pair.requires_grad_(trainable)
        self.shared[adapter_name] = shared
        self.scaling[adapter_name] = config.scale_scalings()
        dropout = config.lora_dropout
        self.msplora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def concatenated_factors(self, adapter_name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All scales as one pair: A (R, in_features) and scaled B (out_features, R), R the sum of ranks.

        The sum of the scales' products is the product of the concatenations, so the layer costs two
        matrix products however many scales there are.
        """
        scaling, shared = self.scaling[adapter_name], self.shared[adapter_name]
        for scale, pair in shared.items():
            if pair.A.ndim != 2 or hasattr(pair.A, "placements"):  # a shard of FSDP1, or of FSDP2
                raise RuntimeError(_SHARDED.format(scale))
        pairs: dict[str, Any] = {
            scale: shared[scale] if scale in shared else getattr(self, f"msplora_{scale}")[adapter_name]
            for scale in SCALES
            if scale in scaling
        }
        # A shared pair lives on one device; with the model spread over several, the others read it from there.
        A = torch.cat([pair.A.to(device) for pair in pairs.values()])
        B = torch.cat([pair.B.to(device) * scaling[scale] for scale, pair in pairs.items()], dim=1)
        return A, B

    def _has(self, adapter_name: str) -> bool:
        return adapter_name in self.scaling

    def _adapted(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        A, B = self.concatenated_factors(adapter_name, x.device)
        inputs = self.msplora_dropout[adapter_name](self._cast_input_dtype(x, A.dtype))
        return result + F.linear(self.hidden(F.linear(inputs, A)), B)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The update dW, in the factors' dtype and the base weight's layout: (out, in), for ``Conv1D`` (in, out)."""
        base_layer: Any = self.get_base_layer()
        A, B = self.concatenated_factors(adapter_name, base_layer.weight.device)
        dtype = A.dtype
        if A.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            A, B = A.float(), B.float()  # half precision products are slow or missing on some processors
        delta = (B @ A).to(dtype)
        return delta.T if isinstance(base_layer, Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Yes: the update is a low-rank product."""
        return True

    def extra_repr(self) -> str:
        """The scales that an earlier layer holds, of each adapter."""
        return ", ".join(
            f"shared by {adapter_name}: {' '.join(pairs)}" for adapter_name, pairs in self.shared.items() if pairs
        )
