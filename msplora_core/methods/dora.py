"""DoRA (Liu et al. 2024, arXiv 2402.09353), as PEFT has it."""

from typing import Any, ClassVar

from msplora_core.methods.lora import Lora


class Dora(Lora):
    """LoRA, and the magnitudes of the weight's rows"""

    name = "dora"
    switches: ClassVar[dict[str, Any]] = {"use_dora": True}
