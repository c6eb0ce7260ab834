"""PEFT, which reads what it wrote."""

from __future__ import annotations

from collections.abc import Iterator

from msplora_analysis.ask.readers.base import UNSPLIT, Fault, Reader, listed
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
            f"before merging: msplora-analyze export {facts.place} --out DIR",
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


READER = Reader(
    name="peft",
    title="PEFT",
    layouts=("peft",),
    to="peft",
    source="PEFT 0.21, tuners/lora/layer.py",
    rules=(start, merging, unknown),
)
