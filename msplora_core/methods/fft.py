"""Full fine-tuning: Trainer, without an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from msplora_core.methods.base import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FullFineTuning(Method):
    """full fine-tuning"""

    name = "fft"
    defaults: ClassVar[dict[str, float]] = {"learning_rate": 2e-5}  # recipes are made for adapters
    spectra = " --base {run}/checkpoint-0"
    skips_parameters = True

    def config(self, base_model: PreTrainedModel, task_type: str) -> None:
        return None
