"""LoHa: the elementwise product of two low-rank matrices, as PEFT saves it.

``<name>.hada_w1_a`` (out, r) and ``hada_w1_b`` (r, in · kernel), the same for w2; a convolution with Tucker cores
``hada_t1`` and ``hada_t2`` (r, r, *kernel) has (r, out) and (r, in). Hyeon-Woo et al. 2022, arXiv 2108.06098.
"""

from __future__ import annotations

from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import Parts, group_parts, layer_matrix, leading, required
from msplora_analysis.formats.helpers.settings import peft_scaling
from msplora_analysis.formats.helpers.structures import hadamard, low_rank, tucker
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Product, Shapes, Sum, Whole, contents
from msplora_analysis.options import Options

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module, all of scale "layer"."""
    modules, unknown = group_parts(file.shapes, config, _FACTORS, _CORES)
    matrices = []
    for name, parts in modules.items():
        scaling = peft_scaling(config, name, rank(parts, file.shapes), parts["hada_w1_b"])
        matrices.append(layer_matrix(name, update(parts, file.shapes, scaling)))
    return contents(matrices, unknown)


def rank(parts: Parts, shapes: Shapes) -> int | None:
    """The r of alpha / r. The update itself has a rank of up to r²."""
    (down,) = required(parts, "hada_w1_b")
    return leading(shapes[down])


def update(parts: Parts, shapes: Shapes, scaling: float = 1.0) -> Sum | Whole:
    """The update of a module from its parts; raises AnalysisError naming one that is missing."""
    return hadamard(_half(parts, shapes, 1), _half(parts, shapes, 2), scaling)


def _half(parts: Parts, shapes: Shapes, number: int) -> Product:
    up, down = required(parts, f"hada_w{number}_a", f"hada_w{number}_b")
    if "hada_t1" in parts or "hada_t2" in parts:
        (core,) = required(parts, f"hada_t{number}")
        return tucker(core, down, up, shapes, up_transposed=True)
    return low_rank(down, up, shapes)


FORMAT = Format(
    name="LoHa",
    read=read,
    peft_types=("LOHA",),
    why_no_lora="adapter_config.json: LOHA has no form as a plain LoRA that is exact for every layer",
)
