"""vLLM: one rank and one alpha for all modules; no DoRA, no modules trained whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

from msplora_analysis.ask.readers.base import (
    MERGE,
    Fault,
    Reader,
    activated,
    deeper,
    exported,
    listed,
    no_targets,
    start,
)
from msplora_analysis.ask.readers.facts import Facts, Module, without

_HELPER = "vLLM, vllm/lora/peft_helper.py"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def scale(facts: Facts, module: Module) -> float:
    r = facts.config["r"]
    return float(facts.config["lora_alpha"] / (math.sqrt(r) if facts.config.get("use_rslora") else r))


def refused(facts: Facts) -> Iterator[Fault]:
    config = facts.config
    if config.get("use_dora"):
        yield Fault("dora", "error", "refuses it", "DoRA", "adapter_config.json: use_dora is true", _HELPER, MERGE)
    if config.get("modules_to_save"):
        what = f"adapter_config.json: modules_to_save is {config['modules_to_save']}"
        yield Fault("whole", "error", "refuses it", "modules trained whole", what, _HELPER, MERGE)
    elif (config.get("bias") or "none") != "none":
        what = f"adapter_config.json: bias is {config['bias']!r}"
        yield Fault("bias", "error", "refuses it", "trained biases", what, _HELPER, MERGE)
    elif others := [name for name in without(facts.rest, "lora_magnitude") if not _embedding(name)]:
        yield Fault(
            "keys",
            "error",
            "refuses it",
            "tensors that are no LoRA weights",
            listed(others),
            "vLLM, vllm/lora/utils.py, parse_fine_tuned_lora_name",
            exported(facts) if set(others) <= set(facts.unknown) else MERGE,
        )


def _embedding(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def ranks(facts: Facts) -> Iterator[Fault]:
    most = max(facts.ranks, default=0)
    allowed = next((rank for rank in _RANKS if rank >= most), None)
    source = "vLLM, vllm/config/lora.py, MaxLoRARanks"
    if allowed is None:
        remedy = MERGE if facts.inexact else f"msplora-analyze compress {facts.place} --out DIR --rank {_RANKS[-1]}"
        what = f"rank {most}; the largest --max-lora-rank is {_RANKS[-1]}"
        yield Fault("rank", "error", "refuses it", "too high a rank", what, source, remedy)
    elif allowed > 16:
        what = f"rank {most}; --max-lora-rank is 16 unless it is given"
        yield Fault("rank", "info", "", "a setting", what, source, f"vllm serve ... --max-lora-rank {allowed}")


def experts(facts: Facts) -> Iterator[Fault]:
    named = facts.experts
    if facts.config.get("use_rslora") and named:
        yield Fault(
            "experts",
            "warning",
            "",
            "rsLoRA of experts",
            f"{len(named)} modules such as {named[0]}: some versions recompute their scale as alpha / r",
            "github.com/vllm-project/vllm/issues/55545",
            exported(facts),
        )


READER = Reader(
    name="vllm",
    title="vLLM",
    layouts=("peft",),
    to="peft",
    source=f"{_HELPER}: r, lora_alpha and use_rslora alone; rsLoRA since github.com/vllm-project/vllm/pull/6909",
    scale=scale,
    rules=(start, deeper, activated, no_targets(f"{_HELPER}, from_dict"), refused, ranks, experts),
)
