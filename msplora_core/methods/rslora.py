from typing import Any, ClassVar

from msplora_core.methods.lora import LoraMethod


class RsLora(LoraMethod):
    """LoRA scaled by alpha / sqrt(rank) (arXiv 2312.03732)"""

    name = "rslora"
    switches: ClassVar[dict[str, Any]] = {"use_rslora": True}
