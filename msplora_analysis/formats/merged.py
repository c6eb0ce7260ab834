"""LoRA of PEFT up to 0.2 with ``enable_lora``: one weight of several parts, such as GPT-2's queries, keys and values.

``lora_A.weight`` is (r g, in) of the g parts that have LoRA, ``lora_B.weight`` (out_g g, r, 1), a convolution in g
groups; ``enable_lora`` says which parts these are. Each is a matrix, ``<name>.0`` the first of the weight, of scale
lora_alpha / r.
Source: class MergedLinear of peft/tuners/lora.py in PEFT 0.2.0, after loralib's.
"""

from __future__ import annotations

from functools import partial

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, layer_matrix, pair_factors
from msplora_analysis.formats.helpers.settings import needed_count, needed_number
from msplora_analysis.formats.helpers.structures import rows_of
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Sum, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight"


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per part of a module that has LoRA."""
    enabled = config["enable_lora"]
    if not isinstance(enabled, list) or not all(isinstance(one, bool) for one in enabled) or not any(enabled):
        raise AnalysisError(f"adapter_config.json: enable_lora must be a list of true and false, got {enabled!r}")
    parts = [i for i, one in enumerate(enabled) if one]
    rank, alpha = needed_count(config, "r"), needed_number(config, "lora_alpha")
    pairs, unknown = pair_factors(file.shapes, config, _FACTOR)
    matrices = []
    for (name, _), (a, b) in pairs.items():
        _, cols = expect_shape(file.shapes, a, rank * len(parts), None)
        outputs, *_ = expect_shape(file.shapes, b, None, rank, 1)
        rows = outputs // len(parts)
        if outputs % len(parts):
            raise AnalysisError(f"tensor {b} has {outputs} rows, which {len(parts)} parts of enable_lora cannot share")
        for place, part in enumerate(parts):
            inner = Factor((a,), rank, cols, partial(rows_of, start=place * rank, count=rank))
            outer = Factor((b,), rows, rank, partial(rows_of, start=place * rows, count=rows))
            matrices.append(layer_matrix(f"{name}.{part}", Sum((Product(inner, outer, alpha / rank),))))
    return contents(matrices, unknown)


FORMAT = Format(
    name="PEFT with enable_lora",
    read=read,
    recognises=lambda config, file: config.get("peft_type") == "LORA" and config.get("enable_lora") is not None,
    why_no_lora="its queries, keys and values are one weight; PEFT since 0.3 has no such adapters",
    priority=1,  # adapter_config.json says LORA
)
