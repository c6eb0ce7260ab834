"""HydraLoRA as its released code saves it: one ``lora_A.weight`` (r, in) for several ``lora_B<i>.weight`` (out, r).

``lora_route.weight`` (parts, in) weights the parts anew for every token (Clin0212/HydraLoRA,
HydraLoRA/peft/tuners/lora.py), so that no one update equals the adapter. Here each part,
lora_alpha / r * B_i A, is a matrix of its own, called ``<module>.<i>``, as it acts with the weight 1.
"""

from __future__ import annotations

import re

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import Parts, add_part, make_product, required, trained_in_full
from msplora_analysis.formats.helpers.routed import part_of, routed_note
from msplora_analysis.formats.helpers.settings import check_rank, needed_count, needed_number
from msplora_analysis.formats.names import PREFIX
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Matrix, Sum, contents
from msplora_analysis.options import Options

_PART = re.compile(r"(?P<name>.+)\.lora_(?P<part>A|B[0-9]{1,4}|route)(?:\.[^.]+)?\.weight")


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per part of each adapted module."""
    rank, alpha = needed_count(config, "r"), needed_number(config, "lora_alpha")
    modules: dict[str, Parts] = {}
    unknown = []
    for key in file.shapes:
        name = key.removeprefix(PREFIX)
        if match := _PART.fullmatch(name):
            add_part(modules, match["name"], match["part"], key)
        elif not trained_in_full(name, config):
            unknown.append(key)
    matrices: list[Matrix] = []
    for name, parts in modules.items():
        a, *_ = required(parts, "A", "B0")
        heads = sum(part.startswith("B") for part in parts)
        if (said := config.get("lora_nums", heads)) != heads:
            raise AnalysisError(
                f"tensor {a} has {heads} factors B beside it, adapter_config.json says lora_nums {said!r}"
            )
        for i, b in enumerate(required(parts, *(f"B{i}" for i in range(heads)))):
            product = make_product(a, b, file.shapes, alpha, {})
            check_rank(a, product.rank, rank)
            matrices.append(part_of(name, i, Sum((product,))))
    return contents(matrices, unknown, [routed_note("HydraLoRA", "B_i A")])


FORMAT = Format(
    name="HydraLoRA",
    read=read,
    recognises=lambda config, file: any(".lora_B0" in name or ".lora_route" in name for name in file.shapes),
    why_no_lora="a router mixes its parts as the input says, which no plain LoRA can do",
    priority=1,  # adapter_config.json says LORA
)
