"""Full fine-tuning: Trainer, without an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from msplora_core.methods.base import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FullFineTuning(Method):
    """All of the model is trained, and written into every checkpoint."""

    name = "fft"
    description = "full fine-tuning"
    learning_rate = 2e-5
    spectra = " --base {run}/checkpoint-0"
    skips_parameters = True

    def config(self, base_model: PreTrainedModel, task_type: str) -> None:
        return None
