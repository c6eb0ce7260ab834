"""LoRA as torchtune itself names it: ``<module>.lora_a.weight`` (r, in) and ``.lora_b.weight`` (out, r).

``adapter_<epoch>.pt`` and ``adapter_model.pt`` hold it; adapter_config.json beside it, which is PEFT's, says ``r`` and
``lora_alpha``. ``.magnitude`` are those of DoRA. Source: torchtune/modules/peft/lora.py and dora.py.
"""

from __future__ import annotations

from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import dora_note, one_scale
from msplora_analysis.formats.helpers.settings import needed_count, needed_number
from msplora_analysis.formats.names import any_named
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+)\.lora_(?P<factor>[ab])\.weight"
_DORA = dora_note("scaling")
_has_factors = any_named(_FACTOR)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module, all of scale "layer"."""
    rank, alpha = needed_count(config, "r"), needed_number(config, "lora_alpha")
    matrices, unknown = one_scale(file.shapes, config, _FACTOR, rank, alpha)
    magnitudes = {key for key in unknown if key.endswith(".magnitude")}
    return contents(matrices, (key for key in unknown if key not in magnitudes), [_DORA] if magnitudes else [])


FORMAT = Format(
    name="torchtune",
    read=read,
    lone=_has_factors,
    recognises=lambda config, file: _has_factors(file.shapes),
    why_no_lora="its modules have torchtune's names; use adapter_model.safetensors, which torchtune writes for PEFT",
    priority=1,  # adapter_config.json says LORA
)
