"""Mixtures of LoRA experts: HydraLoRA, LoRAMoE, and MixLoRA, MoLA and LoRAMoE as MoE-PEFT saves them.

HydraLoRA has one ``lora_A.weight`` (r, in) for several ``lora_B<i>.weight`` (out, r), LoRAMoE a ``lora_A<i>.weight``
for each, and ``lora_route.weight`` (parts, in) weights the parts anew for every token (Clin0212/HydraLoRA,
HydraLoRA/peft/tuners/lora.py; Ablustrund/LoRAMoE, peft/tuners/lora.py). MoE-PEFT has a ``moe_gate.weight`` and
``<module>.experts.<i>.lora_A.weight``, the earlier package mixlora ``<layer>.experts.<i>.<module>.lora_A.weight``;
their experts may have a rank and alpha of their own, ``expert_lora`` (moe_peft/model.py, mixlora/model.py).

No one update equals such an adapter. Here each part, scaling * B_i A_i, is a matrix of its own, called
``<module>.<i>``, as it acts with the weight 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import (
    Parts,
    add_part,
    dora_note,
    layer_matrix,
    make_product,
    required,
    trained_in_full,
)
from msplora_analysis.formats.helpers.routed import part_of, routed_note
from msplora_analysis.formats.helpers.settings import check_rank, needed_count, needed_number
from msplora_analysis.formats.names import PREFIX
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Matrix, Shapes, Sum, contents
from msplora_analysis.options import Options

_PART = re.compile(r"(?P<name>.+)\.lora_(?P<part>[AB][0-9]{0,4}|route)(?:\.[^.]+)?\.weight")
_OF_MOE_PEFT = {"MIXLORA": "mixlora.", "LORAMOE": "loramoe.", "MOLA": "mola."}  # what stands for "model." in its names
_EXPERT = re.compile(r"\.experts\.(?P<index>[0-9]{1,4})(?=\.|$)")
_ROUTER = re.compile(r".+\.(?:moe_)?gate\.weight")


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per part of each adapted module, and one for a module without parts."""
    prefix = _OF_MOE_PEFT.get(config.get("peft_type", ""))
    modules: dict[str, Parts] = {}
    unknown = []
    for key in file.shapes:
        name = key.removeprefix(PREFIX)
        if prefix and name.startswith(prefix):
            name = f"model.{name.removeprefix(prefix)}"
        if match := _PART.fullmatch(name):
            unit, part = match["name"], match["part"]
            if prefix and (expert := _EXPERT.search(unit)):
                unit, part = unit.replace(expert[0], "", 1), part + expert["index"]
            add_part(modules, unit, part, key)
        elif not (prefix and _ROUTER.fullmatch(name)) and not trained_in_full(name, config):
            unknown.append(key)
    matrices = [matrix for name, parts in modules.items() for matrix in _matrices(name, parts, config, file.shapes)]
    method = {"MIXLORA": "MixLoRA", "MOLA": "MoLA"}.get(config.get("peft_type", ""), "a mixture of LoRA experts")
    notes = [routed_note(method, "B_i A_i"), *([dora_note("scaling")] if config.get("use_dora") else [])]
    return contents(matrices, unknown, notes)


def _matrices(name: str, parts: Parts, config: Config, shapes: Shapes) -> Iterator[Matrix]:
    count = sum(part.startswith("B") for part in parts)
    if "B" in parts:  # adapted as by plain LoRA
        a, b = required(parts, "A", "B")
        yield layer_matrix(name, _update(a, b, config, shapes))
        return
    shared = "A0" not in parts
    (first,) = required(parts, "A" if shared else "A0")
    said = config.get("lora_nums", config.get("num_experts", count))
    if said != count:
        key = "lora_nums" if "lora_nums" in config else "num_experts"
        raise AnalysisError(f"tensor {first} has {count} factors B beside it, adapter_config.json says {key} {said!r}")
    experts = {**config, **(config.get("expert_lora") or {})}
    for i in range(count):
        a, b = required(parts, "A" if shared else f"A{i}", f"B{i}")
        yield part_of(name, i, _update(a, b, experts, shapes))


def _update(a: str, b: str, config: Config, shapes: Shapes) -> Sum:
    product = make_product(a, b, shapes, needed_number(config, "lora_alpha"), config)
    check_rank(a, product.rank, needed_count(config, "r"))
    return Sum((product,))


def _recognises(config: Config, file: TensorFile) -> bool:
    return config.get("peft_type") in _OF_MOE_PEFT or any(
        ".lora_B0" in name or ".lora_route" in name for name in file.shapes
    )


FORMAT = Format(
    name="mixtures of LoRA experts",
    read=read,
    peft_types=tuple(_OF_MOE_PEFT),
    recognises=_recognises,
    routed=True,
    why_no_lora="a router mixes its parts as the input says, which no plain LoRA can do",
    priority=1,  # adapter_config.json says LORA
)
