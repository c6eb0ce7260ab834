"""Lily (arXiv 2407.09946), as PEFT has it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from msplora_core.methods.base import RankedMethod

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_PARTS = 3
"""How many As, and how many Bs, all layers share for each type of module."""


class Lily(RankedMethod):
    """As and Bs shared by layers, Bs mixed by a router"""

    name = "lily"
    rank_factor = 4
    spectra = None

    def config(self, base_model: PreTrainedModel, task_type: str) -> PeftConfig:
        from peft import LilyConfig

        stride = math.ceil(base_model.config.num_hidden_layers / _PARTS)
        return LilyConfig(
            r=self.rank, stride_A=stride, num_B=_PARTS, target_modules=self.target_modules, task_type=task_type
        )
