"""SoRA as its released code names it: ``<module>.lora.lora_A`` (r, in), ``lora_B`` (out, r) and ``gate`` (1, r).

The update is lora_alpha / r * B diag(gate) A (Ding et al. 2023, arXiv 2311.11696; TsinghuaC3I/SoRA, src/lora.py). A
proximal step sets gates to zero: what is left are the active ranks. The singular values of the others are zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix
from msplora_analysis.formats.helpers.scales import UNSCALED, alpha_over, why_unscaled
from msplora_analysis.formats.helpers.structures import rows_scaled
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Sum, contents
from msplora_analysis.options import Options

_PARTS = ("lora_A", "lora_B", "gate")


def _has_gates(names: Collection[str]) -> bool:
    return any(name.endswith(".gate") and f"{name.removesuffix('gate')}lora_A" in names for name in names)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module, and a note of the active ranks."""
    shapes = file.shapes
    modules, unknown = group_parts(shapes, config, _PARTS)
    matrices, active = [], {}
    for unit, parts in modules.items():
        name = unit.removesuffix(".lora").removesuffix(".sora_pair")  # of OpenDelta, and of msplora-train
        a, b, gate = (parts[part] for part in _PARTS)
        rank, cols = expect_shape(shapes, a, None, None)
        rows, _ = expect_shape(shapes, b, None, rank)
        if math.prod(shapes[gate]) != rank:
            raise AnalysisError(f"tensor {gate} has shape {list(shapes[gate])}; expected [1, {rank}]")
        active[name] = int(np.count_nonzero(file.read(gate))), rank
        product = Product(
            Factor((a, gate), rank, cols, rows_scaled), Factor((b,), rows, rank), alpha_over(config, rank, a)
        )
        matrices.append(layer_matrix(name, Sum((product,))))
    notes = [_active(active)] if active else []
    return contents(matrices, unknown, [*notes, *([] if "lora_alpha" in config else [UNSCALED])])


def _active(ranks: dict[str, tuple[int, int]]) -> str:
    fewest = min(ranks, key=lambda name: ranks[name][0])
    left, among = (sum(counts) for counts in zip(*ranks.values(), strict=True))
    return (
        f"SoRA: {left} of {among} ranks are active, their gates not zero; "
        f"fewest in {fewest} ({ranks[fewest][0]} of {ranks[fewest][1]})"
    )


FORMAT = Format(
    name="SoRA",
    read=read,
    peft_types=("SORA",),  # of msplora-train
    lone=_has_gates,
    recognises=lambda config, file: (
        config.get("peft_type") == "SORA" or (not config.get("peft_type") and _has_gates(file.shapes))
    ),
    why_no_lora=why_unscaled,
    reads_values=True,
    priority=1,  # before loralib, whose names are the same
)
