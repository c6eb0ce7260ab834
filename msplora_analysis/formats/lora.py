"""LoRA as PEFT saves it: ``<name>.lora_A.weight`` (r, in) and ``<name>.lora_B.weight`` (out, r).

Keys may carry the adapter's name (``lora_A.default.weight``). An embedding has
``lora_embedding_A`` (r, vocabulary) and ``lora_embedding_B`` (dim, r). Convolutions have further
axes: (r, in, height, width) and (out, r, 1, 1).
"""

from __future__ import annotations

import re

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.base import (
    Config,
    Contents,
    Matrix,
    Product,
    Shapes,
    Sum,
    contents,
    make_product,
    module_of,
    number,
    pair_factors,
    stack_and_layer,
    table,
)
from msplora_analysis.options import Options
from msplora_analysis.tensors import TensorFile

PEFT_TYPE = "LORA"

_FACTOR = re.compile(
    r"(?P<name>.+)\.(?:lora_(?P<linear>[AB])(?:\.[^.]+)?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.[^.]+)?)"
)
# Variants whose update is not scaling * B A, so that its spectrum would be wrong in silence.
_VARIANTS = {
    "use_dora": "DoRA (lora_magnitude_vector)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
}


def matches(config: Config, file: TensorFile) -> bool:
    return config.get("peft_type") == PEFT_TYPE


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module, all of scale "layer"."""
    for key, variant in _VARIANTS.items():
        if config.get(key):
            raise AnalysisError(f"{variant} is not supported: its update is not scaling * B A")
    pairs, unknown = pair_factors(file.shapes, config, _parse)
    if magnitudes := [key for key in unknown if "lora_magnitude_vector" in key]:
        raise AnalysisError(f"tensor {magnitudes[0]}: DoRA is not supported: its update is not scaling * B A")
    matrices = []
    for name, (a, b) in pairs.items():
        product = _product(name, a, b, config, file.shapes)
        _, layer = stack_and_layer(name)
        matrices.append(Matrix("layer", layer, module_of(name), name, Sum((product,))))
    return contents(matrices, unknown)


def _parse(name: str) -> tuple[str, str] | None:
    match = _FACTOR.fullmatch(name)
    return (match["name"], match["linear"] or match["embedding"]) if match else None


def _product(name: str, a: str, b: str, config: Config, shapes: Shapes) -> Product:
    rank = _by_pattern(table(config, "rank_pattern"), name, number(config, "r", 8))
    alpha = _by_pattern(table(config, "alpha_pattern"), name, number(config, "lora_alpha", 8))
    product = make_product(a, b, shapes, alpha, config)
    if product.rank != rank:
        raise AnalysisError(
            f"tensor {a} has rank {product.rank}, adapter_config.json says {rank:g}; "
            "is it the config of another adapter?"
        )
    return product


def _by_pattern(patterns: dict[str, int | float], name: str, default: float) -> float:
    """The first entry whose key matches the end of a module's name, as PEFT's get_pattern_key."""
    for key, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error:
            raise AnalysisError(f"adapter_config.json: the pattern {key!r} is not a regular expression") from None
    return default
