"""MSPLoRA as a native PEFT method; importing this package registers it with PEFT."""

from peft.utils import register_peft_method

from .config import MSPLoraConfig
from .layer import LowRankPair, MSPLoraLinear
from .model import MSPLoraModel

__all__ = ["LowRankPair", "MSPLoraConfig", "MSPLoraLinear", "MSPLoraModel"]

register_peft_method(name="msplora", config_cls=MSPLoraConfig, model_cls=MSPLoraModel)
