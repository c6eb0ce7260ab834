"""PEFT, which reads what it wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msplora_analysis.ask.readers.base import UNSPLIT, Fault, Reader, exported, listed
from msplora_analysis.ask.readers.facts import Facts


def merging(facts: Facts) -> Iterator[Fault]:
    if facts.config.get("use_rslora"):
        yield Fault(
            "merge",
            "info",
            "",
            "rsLoRA and add_weighted_adapter",
            f"merged with others, it is scaled by the square root of the new rank in versions before the fix (rank "
            f"{max(facts.ranks, default=0)}: {max(facts.ranks, default=0) ** 0.5:.3g} x)",
            "github.com/huggingface/peft/pull/3449",
            f"before merging: {exported(facts)}",
        )


def start(facts: Facts) -> Iterator[Fault]:
    """PiSSA's exact decomposition and OLoRA's are the same when they are made again; others need not be."""
    if facts.split_off and facts.split_off not in ("pissa", "olora"):
        yield Fault(
            "start",
            "warning",
            "wrong",
            "the base model is split again, and not as it was for training",
            f"adapter_config.json: init_lora_weights is {facts.split_off!r}, of chance, data or quantisation",
            "PEFT 0.21.2, measured: outputs differ after loading with pissa_niter_4, not with pissa and olora",
            UNSPLIT,
        )


def unknown(facts: Facts) -> Iterator[Fault]:
    if facts.unknown:
        yield Fault(
            "keys",
            "warning",
            "in part",
            "tensors that the configuration does not explain",
            listed(facts.unknown),
            "PEFT 0.21, utils/save_and_load.py, set_peft_model_state_dict: unexpected keys raise nothing",
            "use the adapter_config.json that was saved with these weights",
        )


def untargeted(facts: Facts) -> Iterator[Fault]:
    """Modules of the file that PEFT makes no LoRA layers of."""
    if facts.method != "LORA":
        return
    targets, parameters = facts.config.get("target_modules"), facts.config.get("target_parameters")
    source = "PEFT 0.21, measured; tuners/tuners_utils.py, check_target_module_exists"
    if targets is None and not parameters:
        evidence = "adapter_config.json has no target_modules; PEFT takes its own of the model's type, if it knows that"
        yield Fault("targets", "warning", "in part", "no target_modules", evidence, source, exported(facts))
    elif isinstance(targets, list) and not parameters:
        missed = [module.name for module in facts.modules if not _is_targeted(facts.config, module.name)]
        if missed:
            effect = "in part" if targets else "refuses it"
            evidence = f"adapter_config.json leaves out {len(missed)} of {len(facts.modules)} modules: {listed(missed)}"
            yield Fault("targets", "error", effect, "modules that it does not adapt", evidence, source, exported(facts))


def _is_targeted(config: Mapping[str, Any], name: str) -> bool:
    excluded, layers = config.get("exclude_modules"), config.get("layers_to_transform")
    if isinstance(excluded, list) and _ends_with_one(name, excluded):
        return False
    if name in config["target_modules"]:
        return True
    if layers not in (None, []) and not config.get("layers_pattern"):
        first = re.match(r".*?\.[^.]*\.([0-9]+)\.", name)  # of the numbers behind two components, as in PEFT
        if first is None or int(first[1]) not in (layers if isinstance(layers, list) else [layers]):
            return False
    return _ends_with_one(name, config["target_modules"])


def _ends_with_one(name: str, ends: Sequence[object]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)


READER = Reader(
    name="peft",
    title="PEFT",
    layouts=("peft",),
    to="peft",
    source="PEFT 0.21, tuners/lora/layer.py",
    rules=(start, merging, untargeted, unknown),
)
