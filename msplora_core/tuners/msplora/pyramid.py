"""Which modules share which low-rank pair: the pyramid of MSPLoRA, from module names alone.

Every adapted module belongs to one *pyramid*: the modules of one type (last name), one weight shape
and one numbered stack (``bert.encoder.layer``, ``decoder.block``, ...). Inside a pyramid the
``global`` pair is shared by all modules, a ``mid`` pair by one contiguous run of layers, and a
``layer`` pair belongs to one module.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class ModuleAddress(NamedTuple):
    """Where a module stands: ``bert.encoder.layer.3.attention.self.query`` is stack
    ``bert.encoder.layer``, layer 3, module ``query``."""

    stack: str
    layer: int
    module: str


def is_numbered(name: str) -> bool:
    """Whether a module stands in a numbered layer."""
    return any(part.isdecimal() for part in name.split("."))


def parse_module_name(name: str) -> ModuleAddress:
    """Split a dotted module name into stack, layer number and module type.

    The layer number is the first component that is a number as a whole; digits inside other
    components (``wav2vec2``, ``fc1``) do not count. The type is the last component that is not a number.

    Raises:
        ValueError: the name has no numbered component, so nothing tells which layers share with it.
    """
    components = name.split(".")
    numbers = [position for position, text in enumerate(components) if text.isdecimal()]
    if not numbers:
        raise ValueError(
            f"MSPLoRA shares factors among numbered layers, but the module '{name}' has no layer number in its "
            "name; leave it out with exclude_modules, or train it in full with modules_to_save"
        )
    types = [text for text in components if not text.isdecimal()]
    first = numbers[0]
    return ModuleAddress(".".join(components[:first]), int(components[first]), types[-1] if types else "")


def contiguous_groups(layers: Sequence[int], groups: int) -> dict[int, int]:
    """Assign sorted layers to ``groups`` contiguous runs whose sizes differ by at most one.

    The longer runs come first (32 layers in three groups: 11, 11, 10). With fewer layers than groups
    every layer is a group of its own.

    Returns:
        The group's number, from 0, of every layer.
    """
    ordered = sorted(set(layers))
    runs = np.array_split(ordered, min(groups, len(ordered)))
    return {int(layer): group for group, run in enumerate(runs) for layer in run}


def assign_owners(shapes: Mapping[str, tuple[int, int]], mid_groups: int) -> dict[str, dict[str, str]]:
    """Tell for every module and scale whose pair it uses.

    A shared pair is owned by the first module, in the order of ``shapes``, that uses it.

    Args:
        shapes: (out_features, in_features) of every adapted module, by dotted name, in model order.
        mid_groups: number of groups of the ``mid`` scale.

    Returns:
        ``owners[module name][scale]`` = name of the module that owns the pair.

    Raises:
        ValueError: a module without a layer number.
    """
    addresses = {name: parse_module_name(name) for name in shapes}
    pyramids: dict[tuple[str, str, tuple[int, int]], list[str]] = {}
    for name, address in addresses.items():
        pyramids.setdefault((address.stack, address.module, shapes[name]), []).append(name)

    owners: dict[str, dict[str, str]] = {}
    for (stack, module, _), names in pyramids.items():
        layers = [addresses[name].layer for name in names]
        if len(set(layers)) < mid_groups:
            warnings.warn(
                f"mid_groups={mid_groups}, but only {len(set(layers))} layers of '{stack}' have an adapted "
                f"'{module}' of this shape: each of them is a mid group of its own",
                stacklevel=2,
            )
        group_of = contiguous_groups(layers, mid_groups)
        mid_owner: dict[int, str] = {}
        for name, layer in zip(names, layers, strict=True):
            owners[name] = {"global": names[0], "mid": mid_owner.setdefault(group_of[layer], name), "layer": name}
    return owners
