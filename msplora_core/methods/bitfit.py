"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199), the tuner of :mod:`msplora_core.tuners.bitfit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msplora_core.methods.base import Method

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class BitFit(Method):
    """the biases alone"""

    name = "bitfit"
    spectra = None

    def config(self, base_model: PreTrainedModel, task_type: str) -> PeftConfig:
        from msplora_core.tuners.bitfit import BitFitConfig  # PEFT takes seconds to import

        return BitFitConfig(task_type=task_type)
