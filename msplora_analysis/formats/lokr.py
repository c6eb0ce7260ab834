"""LoKr: the Kronecker product of two small matrices, as PEFT saves it.

Each is whole (``<name>.lokr_w1``, ``lokr_w2``) or a low-rank product (``lokr_w1_a`` (rows, r) and ``lokr_w1_b``
(r, cols)); the second, of a convolution, may have a Tucker core ``lokr_t2`` (r, r, *kernel) between (r, rows) and
(r, cols).
Edalati et al. 2022, arXiv 2212.10650; Yeh et al. 2023, arXiv 2309.14859.
"""

from __future__ import annotations

from dataclasses import replace

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import Parts, group_parts, layer_matrix, leading, required
from msplora_analysis.formats.helpers.settings import peft_scaling
from msplora_analysis.formats.helpers.structures import low_rank, tucker, whole
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Kronecker, Shapes, Sum, Whole, contents
from msplora_analysis.options import Options

_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

_OLD = (
    "LoKr of PEFT before 0.14, by its adapter_config.json (no rank_dropout_scale): it was trained with the scale 1; "
    "PEFT applies alpha / r since, and so do these spectra"
)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module, all of scale "layer"."""
    modules, unknown = group_parts(file.shapes, config, (), _PARTS)
    matrices, scales = [], set()
    for name, parts in modules.items():
        scaling = peft_scaling(config, name, rank(parts, file.shapes), next(iter(parts.values())))
        scales.add(scaling)
        matrices.append(layer_matrix(name, update(parts, file.shapes, scaling)))
    is_old = "rank_dropout_scale" not in config and scales != {1.0}
    return contents(matrices, unknown, [_OLD] if is_old else [])


def rank(parts: Parts, shapes: Shapes) -> int | None:
    """The r of alpha / r; None where both matrices are whole."""
    down = parts.get("lokr_w2_b") or parts.get("lokr_w1_b")
    return leading(shapes[down]) if down else None


def update(parts: Parts, shapes: Shapes, scaling: float = 1.0) -> Kronecker:
    """The update of a module from its parts; raises AnalysisError naming one that is missing."""
    return Kronecker(_half(parts, shapes, 1, scaling), _half(parts, shapes, 2))


def _half(parts: Parts, shapes: Shapes, number: int, scaling: float = 1.0) -> Sum | Whole:
    if matrix := parts.get(f"lokr_w{number}"):
        if other := parts.get(f"lokr_w{number}_a") or parts.get(f"lokr_w{number}_b"):
            raise AnalysisError(f"tensors {matrix} and {other} are the same matrix, whole and as factors")
        return whole(matrix, shapes, scaling)
    if f"lokr_w{number}_a" not in parts and f"lokr_w{number}_b" not in parts:
        required(parts, f"lokr_w{number}")
    up, down = required(parts, f"lokr_w{number}_a", f"lokr_w{number}_b")
    if number == 2 and "lokr_t2" in parts:
        product = tucker(parts["lokr_t2"], down, up, shapes, up_transposed=True)
    else:
        product = low_rank(down, up, shapes)
    return Sum((replace(product, scaling=scaling),))


FORMAT = Format(
    name="LoKr",
    read=read,
    peft_types=("LOKR",),
    why_no_lora="adapter_config.json: LOKR has no form as a plain LoRA that is exact for every layer",
)
