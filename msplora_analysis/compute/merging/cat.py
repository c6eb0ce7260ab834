"""The weighted sum, exactly: the factors side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msplora_analysis.compute.linalg.core_space import Array
from msplora_analysis.compute.merging.protocol import Method, Part, Settings


def merge(parts: Sequence[Part], settings: Settings) -> tuple[Array, Array]:
    a = np.concatenate([part.a for part in parts])
    return a, np.concatenate([part.weight * part.b for part in parts], axis=1)


METHOD = Method(merge, "the weighted sum, exactly; ranks add up", "PEFT's combination_type=cat")
