"""Names of tensors and modules: what PEFT puts before them, and what their path tells."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

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


_ORDER = (
    ("qkv_proj", "qkv", "query_key_value", "c_attn", "in_proj", "Wqkv"),
    ("q", "q_proj", "query", "query_proj", "q_lin", "to_q", "wq", "q_a_proj", "q_b_proj"),
    ("k", "k_proj", "key", "key_proj", "k_lin", "to_k", "wk", "kv_a_proj_with_mqa", "kv_b_proj"),
    ("v", "v_proj", "value", "value_proj", "v_lin", "to_v", "wv"),
    ("o", "o_proj", "out_proj", "out_lin", "to_out", "wo", "c_proj", "dense"),
    ("gate_proj", "w1", "wi_0", "gate_up_proj"),
    ("up_proj", "w3", "wi_1", "wi", "fc1", "lin1", "c_fc", "dense_h_to_4h"),
    ("down_proj", "w2", "fc2", "lin2", "dense_4h_to_h"),
)  # fmt: skip
_PLACES = {name: place for place, names in enumerate(_ORDER) for name in names}


def in_model_order(modules: Iterable[str]) -> list[str]:
    """Last names of modules, each once, as a layer applies them: q, k, v, o, gate, up, down; then others by name."""
    return sorted(set(modules), key=lambda name: (_PLACES.get(name, len(_ORDER)), name))


def _is_number(component: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", component) is not None
