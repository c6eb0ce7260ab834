from typing import ClassVar

from msplora_core.methods.base import Method


class FullFineTuning(Method):
    """full fine-tuning"""

    name = "fft"
    defaults: ClassVar[dict[str, float]] = {"learning_rate": 2e-5}  # recipes are made for adapters
    spectra = " --base {run}/checkpoint-0"
    skips_parameters = True
