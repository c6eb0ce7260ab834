"""LoRA of PaddleNLP, saved as safetensors beside lora_config.json: ``<module>.lora_A`` (in, r), ``.lora_B`` (r, out).

A weight of Paddle is (in, out) and its update lora_A lora_B; here it is (lora_A lora_B)ᵀ. The scale is lora_alpha / r,
with rslora lora_alpha / sqrt(r), with pissa 1. Source: paddlenlp/peft/lora/lora_layers.py and lora_config.py.
"""

from __future__ import annotations

import math

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, layer_matrix, pair_factors
from msplora_analysis.formats.helpers.settings import needed_count, needed_number
from msplora_analysis.formats.helpers.structures import transposed
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Sum, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+)\.lora_(?P<factor>[AB])"
_CONFIG = "lora_config.json"
_PISSA = (
    "pissa: training started from a B A that is not zero and a base weight that lacks it; the spectra are of the whole "
    "B A, not of what training changed"
)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module, all of scale "layer"."""
    about = config[_CONFIG]
    if about.get("enable_lora_list") or (about.get("tensor_parallel_degree") or 1) > 1:
        raise AnalysisError(
            f"{_CONFIG}: merged layers (enable_lora_list) and parts of parallel training (tensor_parallel_degree) are "
            "not supported; save it with merge_tensor_parallel"
        )
    rank, alpha = needed_count(about, "r"), needed_number(about, "lora_alpha")
    scaling = 1.0 if about.get("pissa") else alpha / (math.sqrt(rank) if about.get("rslora") else rank)
    pairs, unknown = pair_factors(file.shapes, config, _FACTOR)
    matrices = []
    for (name, _), (a, b) in pairs.items():
        cols, _ = expect_shape(file.shapes, a, None, rank)
        _, rows = expect_shape(file.shapes, b, rank, None)
        inner, outer = Factor((a,), rank, cols, transposed), Factor((b,), rows, rank, transposed)
        matrices.append(layer_matrix(name, Sum((Product(inner, outer, scaling),))))
    return contents(matrices, unknown, [_PISSA] if about.get("pissa") else [])


FORMAT = Format(
    name="PaddleNLP",
    read=read,
    recognises=lambda config, file: _CONFIG in config,
    config_files=dict.fromkeys(("peft_model.safetensors", "peft_model-00001-of-00001.safetensors"), (_CONFIG,)),
    priority=1,  # before loralib, whose names are the same
)
