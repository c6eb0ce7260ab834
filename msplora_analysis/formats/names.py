"""Names of tensors and modules: what PEFT puts before them, and what their path tells."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

PREFIX = "base_model.model."


# What trainers wrap modules in: FSDP, activation checkpointing, torch.compile.
_WRAPPERS = re.compile(r"(?m)(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def without_wrappers(names: Collection[str]) -> dict[str, str]:
    """The names of a whole checkpoint's tensors, by those that the adapter itself has.

    A model inside another, as that of a LightningModule, has a path before PEFT's own; it goes where all of PEFT's
    tensors have the same.
    """
    text = "\n".join(names)
    if f".{PREFIX}" not in text and not _WRAPPERS.search(text):
        return {name: name for name in names}
    bare = {_WRAPPERS.sub("", name): name for name in names}
    before = {name[: name.index(PREFIX)] for name in bare if PREFIX in name}
    (first, *more) = before or {""}
    if more or (first and not first.endswith(".")):
        first = ""
    renamed = {name.removeprefix(first): own for name, own in bare.items()}
    return renamed if len(renamed) == len(names) else {name: name for name in names}


def any_named(pattern: str | re.Pattern[str]) -> Callable[[Collection[str]], bool]:
    """The question whether one of some names is as the pattern says, whole."""
    matches = re.compile(pattern).fullmatch
    return lambda names: any(map(matches, names))


def module_of(name: str) -> str:
    """Last name of a module that is not a number: "query"; "to_out" for "to_out.0"."""
    return next((part for part in reversed(name.split(".")) if not _is_number(part)), name)


def stack_and_layer(name: str) -> tuple[str, int | None]:
    """The path before the first component that is a number, and that number.

    Digits inside other components do not count: "wav2vec2.encoder.layers.3.k_proj" is layer 3 of
    "wav2vec2.encoder.layers". A name without a number is a stack of its own, without a layer.
    """
    components = name.split(".")
    for i, component in enumerate(components):
        if _is_number(component):
            return ".".join(components[:i]), int(component)
    return name, None


def _is_number(component: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", component) is not None
