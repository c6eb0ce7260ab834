from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from msplora_core.methods.base import RankedMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = 3
"""How many As, and how many Bs, all layers share for each type of module."""


class Lily(RankedMethod):
    """As and Bs shared by layers, Bs mixed by a router (arXiv 2407.09946)"""

    name = "lily"
    rank_factor = 4
    peft_config = "peft:LilyConfig"

    def peft_options(self, base_model: PreTrainedModel) -> dict[str, Any]:
        stride = math.ceil(base_model.config.num_hidden_layers / _PARTS)
        return {**super().peft_options(base_model), "stride_A": stride, "num_B": _PARTS}
