"""LoRA of OpenDelta: ``<module>.lora.lora_A`` (r, in), ``.lora_B`` (out, r) in pytorch_model.bin beside config.json.

The update is lora_alpha / lora_r * B A. Source: opendelta/delta_models/lora.py and delta_configs.py, version 0.3.2.
"""

from __future__ import annotations

from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import one_scale
from msplora_analysis.formats.helpers.settings import needed_count, needed_number
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+?)(?:\.lora)?\.lora_(?P<factor>[AB])"


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    rank, alpha = needed_count(config, "lora_r"), needed_number(config, "lora_alpha")
    matrices, unknown = one_scale(file.shapes, config, _FACTOR, rank, alpha)
    return contents(matrices, unknown)


FORMAT = Format(
    name="OpenDelta", read=read, recognises=lambda config, file: config.get("delta_type") == "lora", priority=1
)
