from typing import Any, ClassVar

from msplora_core.methods.lora import LoraMethod


class Dora(LoraMethod):
    """LoRA, and the magnitudes of the weight's rows (arXiv 2402.09353)"""

    name = "dora"
    switches: ClassVar[dict[str, Any]] = {"use_dora": True}
