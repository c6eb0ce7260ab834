"""What a reader is, and what it will do with an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msplora_analysis.ask.readers.facts import LAYOUTS, Facts, Module
from msplora_analysis.formats.helpers.parts import trained_in_full
from msplora_analysis.formats.names import PREFIX

WANTS_EXPORT = "after export"
# What comes of an adapter, the worst first: another form, not loaded, something else computed, a part lost.
EFFECTS = (WANTS_EXPORT, "refuses it", "wrong", "in part")


class Fault(NamedTuple):
    """Something that a reader does with an adapter.

    id: stable identifier. severity: error, warning or info. effect: one of EFFECTS, or "" for what to know. title: a
    few words. evidence: a sentence with names and numbers. source: where it was looked up. remedy: a command or setting
    that mends it. reader: which one, "" for all; ``check`` enters it.
    """

    id: str
    severity: str
    effect: str
    title: str
    evidence: str
    source: str
    remedy: str
    reader: str = ""


Rule = Callable[[Facts], Iterator[Fault]]
MERGE = "merge it into the model with PEFT's merge_and_unload, and use that"


def exported(facts: Facts, to: str = "peft") -> str:
    """The command that writes an adapter anew; what else to do where `export` refuses that."""
    if why_not_exported(facts, to):
        return MERGE
    options = "" if to == "peft" else f" --to {to}"
    if facts.unknown:
        options += " --ignore-unknown"
    return f"msplora-analyze export {facts.place} --out DIR{options}"


def why_not_exported(facts: Facts, to: str) -> str:
    """Why `export --to` refuses an adapter; empty where it does not."""
    target = to.split()[0]
    if facts.inexact or target == "peft":
        return facts.inexact
    if facts.config.get("layer_replication"):
        return "PEFT makes the model deeper (layer_replication)"
    if whole := [name for name in facts.rest if trained_in_full(name.removeprefix(PREFIX), facts.config)]:
        return f"trained beside the factors: {listed(whole)}"
    if target != "gguf" and (found := facts.embeddings):
        return f"embeddings are adapted: {listed(found)}"
    return ""


UNSPLIT = "load it in PEFT as it was trained, and save it with path_initial_model_for_weight_conversion"


def start(facts: Facts) -> Iterator[Fault]:
    """The rule of all readers but PEFT, which splits the base model again."""
    if facts.split_off:
        evidence = (
            f"adapter_config.json: init_lora_weights is {facts.split_off!r}: added to the model as it is published, "
            "the update is wrong by the B A that training started from"
        )
        source = "PEFT, save_pretrained: path_initial_model_for_weight_conversion"
        yield Fault("start", "error", "wrong", "B A is relative to a changed base model", evidence, source, UNSPLIT)


def deeper(facts: Facts) -> Iterator[Fault]:
    """The rule of all readers but PEFT, which copies layers before it adapts them."""
    if layers := facts.config.get("layer_replication"):
        evidence = f"adapter_config.json: layer_replication is {layers}; readers adapt the model as it is published"
        source = "PEFT, tuners/lora/model.py, LoraModel._prepare_model"
        yield Fault("layers", "error", "wrong", "PEFT makes the model deeper first", evidence, source, MERGE)


def activated(facts: Facts) -> Iterator[Fault]:
    """The rule of readers that know no activated LoRA (arXiv 2504.12397)."""
    if tokens := facts.config.get("alora_invocation_tokens"):
        yield Fault(
            "alora",
            "error",
            "wrong",
            "activated LoRA",
            f"adapter_config.json: alora_invocation_tokens is {tokens}; it acts on all tokens, not on later ones",
            "github.com/vllm-project/vllm/pull/19710 (not merged), sgl-project/sglang/issues/16942 (open)",
            "use PEFT, or llama.cpp with its converter, which know it",
        )


def no_targets(source: str) -> Rule:
    """The rule of a reader that needs target_modules."""

    def rule(facts: Facts) -> Iterator[Fault]:
        if "target_modules" not in facts.config:
            evidence = "adapter_config.json has no target_modules"
            yield Fault("targets", "error", "refuses it", "no target_modules", evidence, source, exported(facts))

    return rule


def left_out(source: str, severity: str = "error") -> Rule:
    """The rule of a reader that knows no tensors but factors, and passes over others."""

    def rule(facts: Facts) -> Iterator[Fault]:
        if facts.rest:
            about = listed(facts.rest)
            yield Fault("rest", severity, "in part", "what is trained beside the factors", about, source, MERGE)

    return rule


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A program that reads adapters.

    Attributes:
        name: What ``--for`` calls it.
        title: What it is called.
        layouts: Keys of LAYOUTS that it reads.
        to: The target of ``export`` that it reads best, with the options that it needs.
        source: Where its scale was looked up.
        scale: The factor of B A that it applies to a module; None: what was trained.
        rules: What else it does.
    """

    name: str
    title: str
    layouts: tuple[str, ...]
    to: str
    source: str
    scale: Callable[[Facts, Module], float] | None = None
    rules: Sequence[Rule] = ()

    def faults(self, facts: Facts) -> Iterator[Fault]:
        """What it does with an adapter that deserves a word."""
        base = " --base MODEL" if facts.layout in ("gguf", "kohya") and "--base" not in self.to else ""  # for names
        remedy, why_not = exported(facts, self.to + base), why_not_exported(facts, self.to)
        effect, but = ("refuses it", f"; export refuses it: {why_not}") if why_not else (WANTS_EXPORT, "")
        if facts.layout not in self.layouts:
            evidence = f"it is {LAYOUTS[facts.layout]}; {self.title} reads {_either(self.layouts)}{but}"
            yield Fault("layout", "error", effect, "another layout", evidence, self.source, remedy)
            return
        if facts.layout == "peft" and facts.method != "LORA" and self.name != "peft":
            evidence = f"adapter_config.json: peft_type is {facts.method}{but}"
            yield Fault("method", "error", effect, "no plain LoRA", evidence, self.source, remedy)
            return
        if self.scale is not None:
            yield from self._scales(facts, remedy)
        for rule in self.rules:
            yield from rule(facts)

    def _scales(self, facts: Facts, remedy: str) -> Iterator[Fault]:
        assert self.scale is not None
        wrong = []
        for module in facts.modules:
            if module.scale is not None and not math.isclose(applied := self.scale(facts, module), module.scale):
                wrong.append((module, applied))
        if wrong:
            module, applied = wrong[0]
            ratio = applied / module.scale if module.scale else math.inf
            evidence = (
                f"{len(wrong)} of {len(facts.modules)} modules: {module.name} was trained with {module.scale:.4g} "
                f"and gets {applied:.4g} ({ratio:.3g} x)"
            )
            yield Fault("scale", "error", "wrong", "another scale", evidence, self.source, remedy)


def _either(layouts: Sequence[str]) -> str:
    return " or ".join(LAYOUTS[layout] for layout in layouts)


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
