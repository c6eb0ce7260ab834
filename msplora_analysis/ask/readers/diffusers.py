"""diffusers: its own files and kohya's."""

from __future__ import annotations

from collections.abc import Iterator

from msplora_analysis.ask.readers.base import Fault, Reader, exported
from msplora_analysis.ask.readers.facts import Facts


def mixed_ranks(facts: Facts) -> Iterator[Fault]:
    """Versions before pull request 14409 take the rank that comes first as the alpha of all."""
    if facts.layout == "diffusers" and len(facts.ranks) > 1 and not facts.has_alpha:
        first = facts.modules[0].rank
        other = next(module for module in facts.modules if module.rank != first)
        yield Fault(
            "scale",
            "warning",
            "",
            "ranks differ, and the file has no alpha",
            f"ranks {facts.ranks}: before the fix, the rank of the first key is the alpha of all; with {first}, "
            f"{other.name} of rank {other.rank} gets {first / other.rank:.3g} x",
            "github.com/huggingface/diffusers/pull/14409",
            f"update diffusers, or: {exported(facts, 'diffusers')}",
        )


def kohya_attention(facts: Facts) -> Iterator[Fault]:
    """Alphas that differ are looked up by names that attentions of a U-Net do not have then."""
    in_unet = [module for module in facts.modules if module.name.startswith("unet.") and ".attn" in module.name]
    alphas = {module.scale * module.rank for module in facts.modules if module.scale is not None}
    if facts.layout == "kohya" and in_unet and len(alphas) > 1:
        yield Fault(
            "scale",
            "error",
            "wrong",
            "alphas differ, and those of a U-Net's attentions are not found",
            f"alphas {', '.join(f'{alpha:g}' for alpha in sorted(alphas))}; {len(in_unet)} modules such as "
            f"{in_unet[0].name} get that of most",
            "diffusers 0.42.1, measured: _convert_non_diffusers_lora_to_diffusers and get_peft_kwargs",
            exported(facts, "diffusers"),
        )


READER = Reader(
    name="diffusers",
    title="diffusers",
    layouts=("diffusers", "kohya"),
    to="diffusers --base MODEL",
    source="diffusers 0.42.1, src/diffusers/utils/peft_utils.py, get_peft_kwargs",
    rules=(mixed_ranks, kohya_attention),
)
