"""Updates of several parts that a router mixes as the input says: each part is a matrix of its own."""

from __future__ import annotations

from msplora_analysis.formats.names import module_of, stack_and_layer
from msplora_analysis.formats.updates import Matrix, Update


def part_of(name: str, index: int, update: Update) -> Matrix:
    """A part of the update of the module ``name``, called ``<name>.<index>``."""
    return Matrix("layer", stack_and_layer(name)[1], module_of(name), f"{name}.{index}", update)


def routed_note(method: str, part: str) -> str:
    """What a reader of the spectra of parts must know; ``part``: the formula of one."""
    return (
        f"{method}: a router weights the parts of a module anew for every input, so that there is no one update; the "
        f"spectra are of each part, {part}, with the weight 1"
    )
