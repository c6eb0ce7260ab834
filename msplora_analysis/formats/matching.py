"""The same modules of several adapters, where trainers give them other names.

PEFT, MLX and torchtune name a module by its path in the model that was trained, with or without what stands before its
body; diffusers puts the model of the pipeline before it; kohya's scripts have underscores for dots.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.full import align

_MODEL = re.compile(r"(?:unet|transformer(?:_2)?|text_encoder(?:_[23])?|prior)[._]")
_KOHYA = re.compile(r"(?:lora|lycoris)_(?:unet_|te[123]?_)?")


def matched(adapters: Sequence[Collection[str]]) -> list[dict[str, str]]:
    """Of each adapter the name of every module, and the name that all have for it: that of the first that has it.

    Names that are equal match; then those that are equal without a prefix that all of an adapter share; then those that
    are equal with underscores for dots and without the model of a pipeline. What matches nothing keeps its name.

    Example:
        >>> matched([["unet.mid_block.to_q"], ["mid_block.to_q"]])
        [{'unet.mid_block.to_q': 'unet.mid_block.to_q'}, {'mid_block.to_q': 'unet.mid_block.to_q'}]
    """
    known: dict[str, None] = {}
    found = []
    for names in adapters:
        own = _of_one(names, known)
        known.update(dict.fromkeys(own.values()))
        found.append(own)
    return found


def _of_one(names: Collection[str], known: Collection[str]) -> dict[str, str]:
    own = {name: name for name in names if name in known}
    with suppress(AnalysisError):  # no prefix, or several, make names agree
        own |= {name: other for name, other in align(names, known).items() if name not in own}
    flat: dict[str, list[str]] = {}
    for other in known:
        flat.setdefault(_flattened(other), []).append(other)
    for name in names:
        candidates = flat.get(_flattened(name), [])
        if name not in own and len(candidates) == 1:
            own[name] = candidates[0]
    result = {name: own.get(name, name) for name in names}
    # Two modules of one adapter are never the same one.
    return result if len(set(result.values())) == len(result) else {name: name for name in names}


def _flattened(name: str) -> str:
    return _MODEL.sub("", _KOHYA.sub("", name, count=1), count=1).replace(".", "_")
