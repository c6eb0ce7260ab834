"""Lily as PEFT saves it: ``<module>.lily_A.weight`` (r, in), ``lily_B.weight`` (experts · r, out) and a router.

A is shared by neighbouring layers, the experts of B by all; the router of a layer mixes the experts as the input says
(Zhong et al. 2024, arXiv 2407.09946; peft/tuners/lily/layer.py). Here each expert, scaling * B_iᵀ A, is a matrix of its
own, called ``<module>.<i>``, as it acts with the weight 1.
"""

from __future__ import annotations

from functools import partial

from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts
from msplora_analysis.formats.helpers.routed import part_of, routed_note
from msplora_analysis.formats.helpers.settings import needed_count, needed_number
from msplora_analysis.formats.helpers.structures import rows_transposed
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Matrix, Product, Sum, contents
from msplora_analysis.options import Options

_PARTS = ("lily_A", "lily_B", "lily_router")


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per expert of each adapted module."""
    shapes = file.shapes
    rank, experts, scaling = needed_count(config, "r"), needed_count(config, "num_B"), needed_number(config, "scaling")
    modules, unknown = group_parts(shapes, config, _PARTS)
    matrices: list[Matrix] = []
    for name, parts in modules.items():
        a, b, router = (parts[part] for part in _PARTS)
        _, cols = expect_shape(shapes, a, rank, None)
        _, rows = expect_shape(shapes, b, experts * rank, None)
        expect_shape(shapes, router, experts, rank)
        inner = Factor((a,), rank, cols)
        for i in range(experts):
            outer = Factor((b,), rows, rank, partial(rows_transposed, start=i * rank, count=rank))
            matrices.append(part_of(name, i, Sum((Product(inner, outer, scaling),))))
    return contents(matrices, unknown, [routed_note("Lily", "B_i A")])


FORMAT = Format(
    name="Lily",
    read=read,
    peft_types=("LILY",),
    routed=True,
    shares_layers=True,
    why_no_lora="a router mixes its experts as the input says, which no plain LoRA can do",
)
