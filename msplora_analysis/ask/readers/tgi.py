"""Text Generation Inference: one scale; factors of a type of module stacked over all layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from msplora_analysis.ask.readers.base import MERGE, Fault, Reader, activated, deeper, left_out, listed, start
from msplora_analysis.ask.readers.facts import Facts
from msplora_analysis.ask.readers.vllm import scale
from msplora_analysis.formats.names import module_of, stack_and_layer

_CODE = "TGI, server/text_generation_server/adapters/lora.py"
_MAPPING = f"{_CODE}, map_weights_for_model: lora_A and lora_B alone"


def layers(facts: Facts) -> Iterator[Fault]:
    ranks, where = defaultdict(set), defaultdict(set)
    for module in facts.modules:
        layer = stack_and_layer(module.name)[1]
        if layer is not None:
            ranks[module_of(module.name)].add(module.rank)
            where[module_of(module.name)].add(layer)
    if mixed := [kind for kind, of in ranks.items() if len(of) > 1]:
        lowest = min(min(ranks[kind]) for kind in mixed)
        yield Fault(
            "ranks",
            "error",
            "refuses it",
            "ranks that differ between layers",
            f"{listed(mixed)}: ranks {sorted(ranks[mixed[0]])}",
            f"{_CODE}, LoraWeights: torch.stack",
            MERGE if facts.inexact else f"msplora-analyze compress {facts.place} --out DIR --rank {lowest}",
        )
    last = max((layer for of in where.values() for layer in of), default=-1)
    if partial := [kind for kind, of in where.items() if len(of) <= last]:
        yield Fault(
            "layers",
            "error",
            "in part",
            "modules that only some layers adapt",
            f"{listed(partial)}: in {len(where[partial[0]])} of {last + 1}+ layers; all of a name are left out",
            f"{_CODE}, prepare_weights",
            MERGE,
        )


def embeddings(facts: Facts) -> Iterator[Fault]:
    if found := facts.embeddings:
        yield Fault("embeddings", "error", "in part", "adapted embeddings", listed(found), _MAPPING, MERGE)


READER = Reader(
    name="tgi",
    title="TGI",
    layouts=("peft",),
    to="peft",
    source=f"{_CODE}, prepare_weights: r, lora_alpha and use_rslora alone",
    scale=scale,
    rules=(start, deeper, activated, layers, embeddings, left_out(_MAPPING)),
)
