"""LoRA-XS as its released code saves it: PEFT's ``lora_A.weight`` and ``lora_B.weight``, frozen, and a core.

``<module>_lora_latent_mapping.weight`` (r, r), or ``<module>.default_lora_latent_mapping.weight``, is the R of
scaling * B R A (Bałazy et al. 2024, arXiv 2405.17604; MohammadrezaBanaei/LoRA-XS, utils/latent_utils.py).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, layer_matrix, make_product, pair_factors
from msplora_analysis.formats.helpers.settings import by_pattern, check_rank, needed_count, needed_number
from msplora_analysis.formats.names import PREFIX
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Sum, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight"
_CORE = "lora_latent_mapping.weight"


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    rank, alpha = needed_count(config, "r"), needed_number(config, "lora_alpha")
    pairs, unknown = pair_factors(file.shapes, config, _FACTOR)
    cores = {}
    for key in (key for key in file.shapes if key.endswith(_CORE)):
        path = key.removeprefix(PREFIX).removesuffix(_CORE)
        name = next((name for name in (path[:-1], path.rpartition(".")[0]) if (name, "") in pairs), None)
        if name is None:
            raise AnalysisError(
                f"tensor {key} has no lora_A and lora_B beside it, the frozen factors of LoRA-XS; save them with it"
            )
        cores[name] = key
    matrices = []
    for (name, _), (a, b) in pairs.items():
        if name not in cores:
            raise AnalysisError(f"tensor {a} has no lora_latent_mapping beside it, the core of LoRA-XS; save it again")
        own = int(by_pattern(config, "rank_pattern", name, rank))
        product = make_product(a, b, file.shapes, by_pattern(config, "alpha_pattern", name, alpha), config)
        check_rank(a, product.rank, own)
        expect_shape(file.shapes, cores[name], own, own)
        inner = Factor((cores[name], a), own, math.prod(file.shapes[a][1:]), _multiplied)
        matrices.append(layer_matrix(name, Sum((replace(product, a=inner),))))
    return contents(matrices, (key for key in unknown if key not in cores.values()))


def _multiplied(core: NDArray[Any], a: NDArray[Any]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = core.astype(np.float64) @ a.reshape(len(a), -1).astype(np.float64)
    return product


FORMAT = Format(
    name="LoRA-XS",
    read=read,
    recognises=lambda config, file: any("lora_latent_mapping" in name for name in file.shapes),
    priority=1,  # adapter_config.json says LORA
)
