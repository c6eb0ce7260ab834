"""LoRA of OpenDelta: ``<module>.lora.lora_A`` (r, in), ``.lora_B`` (out, r) in pytorch_model.bin beside config.json.

The update is lora_alpha / lora_r * B A. Source: opendelta/delta_models/lora.py and delta_configs.py, version 0.3.2.
"""

from __future__ import annotations

from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import layer_matrix, make_product, pair_factors
from msplora_analysis.formats.helpers.settings import check_rank, needed_count, needed_number
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Sum, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+?)(?:\.lora)?\.lora_(?P<factor>[AB])"


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    rank, alpha = needed_count(config, "lora_r"), needed_number(config, "lora_alpha")
    pairs, unknown = pair_factors(file.shapes, config, _FACTOR)
    matrices = []
    for (name, _), (a, b) in pairs.items():
        product = make_product(a, b, file.shapes, alpha, {})
        check_rank(a, product.rank, rank)
        matrices.append(layer_matrix(name, Sum((product,))))
    return contents(matrices, unknown)


FORMAT = Format(
    name="OpenDelta", read=read, recognises=lambda config, file: config.get("delta_type") == "lora", priority=1
)
