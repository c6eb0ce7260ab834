"""MSPLoRA as a native PEFT method; importing this package registers it with PEFT."""

from msplora_core.method.config import MSPLoraConfig
from msplora_core.method.model import MSPLoraModel

__all__ = ["MSPLoraConfig", "MSPLoraModel"]
