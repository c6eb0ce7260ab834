"""Paths of modules in the model, where a file calls them otherwise: kohya's underscores, llama.cpp's names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.helpers.flattened import dotted, is_known, is_own_code
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Matrix, Shape, Sum
from msplora_analysis.write.base_model import PIPELINE, BaseModel
from msplora_analysis.write.llama_cpp import LlamaCpp

_FLATTENED = re.compile(r"(?:lora|lycoris)_(?:(?P<model>unet|te[123]?)_)?(?P<path>.+)")
# Where a pipeline may have what a file says is of this model.
_MODELS = {
    "unet": ("unet", "transformer", "prior", ""),
    "te": ("text_encoder", ""),
    "te1": ("text_encoder", ""),
    "te2": ("text_encoder_2", ""),
    "te3": ("text_encoder_3", ""),
}


@dataclass(frozen=True)
class Module:
    """A module of the base model and its update.

    Attributes:
        name: Dotted path in the base model.
        matrix: Its row of the tables.
        update: Its whole update.
        inputs: The axes of A behind the first; more than one for a convolution.
        is_embedding: Whether PEFT calls its factors those of an embedding.
        rows: Which rows of its B the model has in turn; None: they are in order.
    """

    name: str
    matrix: Matrix
    update: Sum
    inputs: Shape
    is_embedding: bool = False
    rows: NDArray[np.intp] | None = None


def as_in_the_model(
    modules: Sequence[Module], known: Format, base: BaseModel | None, notes: list[str]
) -> Iterator[Module]:
    """Modules by their path in the model; ``notes`` gets a word where it was taken from known names.

    Raises:
        AnalysisError: the file does not tell it, and the base is not there or does not either.
    """
    if known.names_of_llama_cpp:
        yield from _from_llama_cpp(modules, base)
        return
    flat: dict[str, list[tuple[str, str]]] = {}
    for part, names in (base.names if base else {}).items():
        for name in names:
            flat.setdefault(name.replace(".", "_"), []).append((part, name))
    guessed = False
    for module in modules:
        key = module.update.products[0].a.tensors[0]
        first = key.partition(".")[0]
        if dotted(first) == first:
            yield module
        else:
            guessed |= not flat
            yield replace(module, name=_unflattened(first, key, module.name, flat))
    if guessed:
        notes.append(
            "underscores of its module names were read as dots where diffusers has such names; with a base it is sure"
        )


def _unflattened(first: str, key: str, guess: str, flat: dict[str, list[tuple[str, str]]]) -> str:
    if not flat:
        if is_known(first):  # a U-Net has no such blocks: it is a transformer's
            return re.sub(r"^unet\.(?=(single_)?transformer_blocks\.)", "transformer.", guess)
        raise AnalysisError(
            f"tensor {key}: the dots of the module's name are not in the file; give the model, or a list of the names "
            "of its modules, as base=",
            "base",
        )
    match = _FLATTENED.fullmatch(first)
    parts = _MODELS.get(match["model"] or "") if match else None
    path = match["path"] if match else first
    found = [(part, name) for part, name in flat.get(path, ()) if parts is None or part in parts]
    if len(found) != 1:
        what = f"is {' or '.join(sorted(name for _, name in found))}" if found else "fits no module"
        hint = ""
        if is_own_code(first):
            hint = (
                "; it has a name of the model's own code, which diffusers translates where it loads such a file itself"
            )
        raise AnalysisError(f"tensor {key} {what} of base=; expected is exactly one{hint}", "base")
    ((part, name),) = found
    guessed = PIPELINE.match(guess)
    part = part or (guessed[1] if guessed else "")
    return f"{part}.{name}" if part else name


def _from_llama_cpp(modules: Sequence[Module], base: BaseModel | None) -> Iterator[Module]:
    model = LlamaCpp(base)
    names = model.modules()
    for module in modules:
        if module.name not in names:
            raise AnalysisError(
                f"{module.name}: no module of base= is called so in llama.cpp; is it the adapter's model?", "base"
            )
        order = model.rows(module.name, module.update.rows)
        rows = None if order is None else np.argsort(order)
        yield replace(module, name=names[module.name], rows=rows, is_embedding=module.name == "token_embd")
