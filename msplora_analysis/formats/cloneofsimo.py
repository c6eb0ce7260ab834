"""LoRA of cloneofsimo's lora (github.com/cloneofsimo/lora) for Stable Diffusion: ``unet:<i>:up`` and ``unet:<i>:down``.

up is (out, r), down (r, in), of a convolution with further axes; the update is up down, of scale 1, which its users
choose when they load it. Modules have numbers, in the order in which the model has them, and no names: ``unet.0``.
Source: save_safeloras_with_embeds and extract_lora_as_tensor of lora_diffusion/lora.py.
"""

from __future__ import annotations

import re

from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import add_part, layer_matrix, required
from msplora_analysis.formats.helpers.structures import low_rank
from msplora_analysis.formats.names import any_named
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Sum, contents
from msplora_analysis.options import Options

_FACTOR = re.compile(r"(?P<model>[^:]+):(?P<number>[0-9]{1,9}):(?P<part>up|down)")
_NO_NAMES = (
    "the file has numbers for the modules, in the order of the model, and no names; its readers choose a scale, here 1"
)
_has_factors = any_named(_FACTOR)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per module, named by its model and number."""
    modules: dict[str, dict[str, str]] = {}
    unknown = []
    for key in file.shapes:
        if match := _FACTOR.fullmatch(key):
            add_part(modules, f"{match['model']}.{match['number']}", match["part"], key)
        elif file.metadata.get(key) != "<embed>":  # a word that was learned beside it
            unknown.append(key)
    pairs = {name: required(parts, "down", "up") for name, parts in modules.items()}
    matrices = [layer_matrix(name, Sum((low_rank(down, up, file.shapes),))) for name, (down, up) in pairs.items()]
    return contents(matrices, unknown, [_NO_NAMES])


FORMAT = Format(
    name="cloneofsimo's lora",
    read=read,
    lone=_has_factors,
    recognises=lambda config, file: not config.get("peft_type") and _has_factors(file.shapes),
    why_no_lora="its modules have numbers and no names",
    priority=1,
)
