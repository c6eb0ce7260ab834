"""TIES-Merging of the dense updates: trim, elect a sign, merge what agrees (Yadav et al. 2023, arXiv 2306.01708).

Entries are trimmed by module. PEFT trims the factors instead, whose entries are no entries of the update.
"""

from __future__ import annotations

from collections.abc import Sequence

from msplora_analysis.compute.linalg.core_space import Array
from msplora_analysis.compute.merging.elementwise import by_entries, thresholds, trim_elect_merge
from msplora_analysis.compute.merging.protocol import Method, Part, Settings


def merge(parts: Sequence[Part], settings: Settings) -> tuple[Array, Array]:
    # A generator: one dense update at a time.
    least = thresholds((abs(part.weight) * (part.b @ part.a) for part in parts), settings.density)
    return by_entries(parts, settings, lambda values: trim_elect_merge(values, least))


METHOD = Method(merge, "trim, elect a sign, mean of what agrees; of dense updates", "arXiv 2306.01708", cuts=True)
