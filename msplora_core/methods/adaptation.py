"""Make a base model ready to be trained with a method: its adapter, its trainer, its callbacks."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Any

import torch
from peft import AdaLoraConfig, LilyConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from msplora_core.data.tasks import get_task
from msplora_core.errors import TrainingError
from msplora_core.methods.adalora import INITIAL_RANK
from msplora_core.methods.dylora import RankSampler
from msplora_core.train.stateful import AdaLoraTrainer, PissaTrainer
from msplora_core.train.trainer import AdapterTrainer
from msplora_core.tuners.bitfit import BitFitConfig
from msplora_core.tuners.bottleneck import BottleneckConfig
from msplora_core.tuners.bottleneck.drop import LayerDropper
from msplora_core.tuners.msplora import MSPLoraConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from msplora_core.run.settings import Settings

_LORA_VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {},
    "dylora": {},  # a matter of training: see callbacks
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
_LILY_PARTS = 3
"""How many As, and how many Bs, all layers share for each type of module with Lily."""


def quantization_config(settings: Settings) -> Any:
    """How to quantise the base model on loading: for QLoRA as in arXiv 2305.14314, else None.

    Raises:
        TrainingError: the package that quantises is not installed.
    """
    if settings.method != "qlora":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError("the method qlora needs the package bitsandbytes; run: pip install 'bitsandbytes>=0.50'")
    from transformers import BitsAndBytesConfig

    compute = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["classifier", "score", "lm_head"],  # heads are trained, or are the embedding
    )


def keep_quantized(model: Any) -> Any:
    """Keep bitsandbytes from packing 4-bit weights for quick inference on some CPUs: it rounds them, for good."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def adapt(base_model: Any, settings: Settings) -> Any:
    """Put the adapter of ``settings.method`` into a model; with full fine-tuning, the model stays as it is.

    Raises:
        TrainingError: ranks or target modules that do not fit the model.
    """
    if settings.method == "fft":
        return base_model
    try:
        return get_peft_model(keep_quantized(base_model), _config(settings, base_model))
    except ValueError as error:
        raise TrainingError(" ".join(str(error).split())) from error


def trainer_class(settings: Settings) -> type[AdapterTrainer]:
    """The Trainer of a method."""
    special: dict[str, type[AdapterTrainer]] = {"adalora": AdaLoraTrainer, "pissa": PissaTrainer}
    return special.get(settings.method, AdapterTrainer)


def callbacks(model: PeftModel, settings: Settings) -> list[TrainerCallback]:
    """What a method does in every training step, besides the optimiser's."""
    if settings.method == "dylora":
        return [RankSampler(model, settings.seed)]
    if settings.method == "adapterdrop" and settings.dropped_layers is None:
        return [LayerDropper(model, settings.seed)]
    return []


def _config(settings: Settings, base_model: Any) -> PeftConfig:
    """The PEFT configuration of a method."""
    method = settings.method
    task_type = get_task(settings.task).peft_task_type
    if method == "bitfit":
        return BitFitConfig(task_type=task_type)
    targets: dict[str, Any] = {"task_type": task_type, "target_modules": settings.target_modules}
    if method == "adapterdrop":
        return BottleneckConfig(
            bottleneck=settings.bottleneck or 16, dropped_layers=settings.dropped_layers or 0, **targets
        )
    rank = settings.rank or 8
    if method == "lily":
        stride = math.ceil(base_model.config.num_hidden_layers / _LILY_PARTS)
        return LilyConfig(r=rank, stride_A=stride, num_B=_LILY_PARTS, **targets)
    lora = targets | {"lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    if method == "msplora":
        return MSPLoraConfig(r=rank, ranks=settings.ranks, **lora)
    if method == "adalora":
        # PEFT's default for AdaLoRA has other modules, the classifier's among them
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base_model.config.model_type)
        lora["target_modules"] = settings.target_modules or defaults
        # the schedule needs the number of steps: RankPruning gives the true one
        return AdaLoraConfig(target_r=rank, init_r=math.ceil(INITIAL_RANK * rank), total_step=1, **lora)
    return LoraConfig(r=rank, **_LORA_VARIANTS[method], **lora)
