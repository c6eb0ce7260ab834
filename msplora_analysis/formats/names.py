"""Names of tensors and modules: what PEFT puts before them, and what their path tells."""

from __future__ import annotations

import re

PREFIX = "base_model.model."


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
