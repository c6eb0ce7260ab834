"""What holds whatever reads the adapter."""

from __future__ import annotations

from collections.abc import Iterator

from msplora_analysis.ask.readers.base import Fault, exported, listed
from msplora_analysis.ask.readers.facts import Facts


def declared_ranks(facts: Facts) -> Iterator[Fault]:
    wrong = [module for module in facts.modules if module.rank != module.declared]
    if wrong:
        first = wrong[0]
        yield Fault(
            "rank",
            "error",
            "refuses it",
            "ranks are not those that adapter_config.json declares",
            f"{len(wrong)} of {len(facts.modules)} modules: {first.name} is declared {first.declared}, and its lora_A "
            f"has {first.rank}",
            "PEFT makes factors of the declared ranks, and loading others fails; a trainer that loses rank_pattern: "
            "github.com/MakazhanAlpamys/Soup/issues/803",
            "use the adapter_config.json that was saved with these weights, or correct r and rank_pattern in it",
        )


def no_update(facts: Facts) -> Iterator[Fault]:
    if facts.zero:
        everything = len(facts.zero) == len(facts.modules)
        yield Fault(
            "zero",
            "error" if everything else "warning",
            "wrong" if everything else "",
            "the adapter changes nothing" if everything else "some updates are zero",
            f"B or its scale is zero in {len(facts.zero)} of {len(facts.modules)} modules: {listed(facts.zero)}",
            "B starts at zero (Hu et al. 2021, arXiv 2106.09685): these were not trained, or were saved too early",
            "train again, and look whether these modules receive gradients",
        )


def rslora(facts: Facts) -> Iterator[Fault]:
    if facts.config.get("use_rslora"):
        yield Fault(
            "rslora",
            "info",
            "",
            "older versions of several readers take rsLoRA for LoRA",
            f"use_rslora is true: their scale is too small by the square root of the rank "
            f"({max(facts.ranks, default=0) ** -0.5 if facts.ranks else 1:.3g} x)",
            "github.com/vllm-project/vllm/pull/6909, NVIDIA/TensorRT-LLM/pull/1669, turboderp-org/exllamav2/pull/619",
            exported(facts),
        )


def no_alpha(facts: Facts) -> Iterator[Fault]:
    if facts.layout in ("diffusers", "kohya") and not facts.has_alpha:
        unused = facts.metadata.get("ss_network_alpha")
        yield Fault(
            "alpha",
            "info",
            "",
            "the file has no alpha",
            "its scale is taken as 1" + (f"; ss_network_alpha {unused} is not applied" if unused else ""),
            "diffusers, get_peft_kwargs; ComfyUI, comfy/weight_adapter/lora.py",
            "if it was trained with another alpha, write that into the file",
        )


def wide(facts: Facts) -> Iterator[Fault]:
    if facts.wide:
        yield Fault(
            "dtype",
            "info",
            "",
            "factors are float64",
            "readers round them to the type of the model; MLX-LM and llama.cpp have no such type",
            "llama.cpp, convert_lora_to_gguf.py, --outtype",
            exported(facts, "peft --dtype float32"),
        )


RULES = (declared_ranks, no_update, rslora, no_alpha, wide)
