from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from msplora_core.errors import TrainingError
from msplora_core.methods.lora import LoraMethod

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel


class QLora(LoraMethod):
    """LoRA on a base model in 4 bits (arXiv 2305.14314)"""

    name = "qlora"

    def quantization(self, precision: str) -> BitsAndBytesConfig:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise TrainingError(
                "the method qlora needs the package bitsandbytes; run: pip install 'bitsandbytes>=0.50'"
            )
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision],
            llm_int8_skip_modules=["classifier", "score", "lm_head"],  # heads are trained, or are the embedding
        )

    def adapt(self, base_model: PreTrainedModel, task_type: str) -> torch.nn.Module:
        return super().adapt(keep_quantized(base_model), task_type)


def keep_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes from packing 4-bit weights for quick inference on some CPUs: it rounds them, for good."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
