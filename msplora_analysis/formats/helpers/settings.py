"""Numbers of adapter_config.json, checked."""

from __future__ import annotations

import math
from typing import Any

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.helpers.patterns import Patterns
from msplora_analysis.formats.updates import Config

_MOST_KEPT = 8
_patterns: dict[tuple[int, str], tuple[Config, Patterns]] = {}  # of configurations that were met last


def number(config: Config, key: str, default: float | None = None) -> float:
    """A number of adapter_config.json; ``default`` where the key is missing or null."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AnalysisError(f"adapter_config.json: {key} must be a number, got {value!r}")
    return value


def table(config: Config, key: str) -> dict[str, int | float]:
    """A ``{name: number}`` of adapter_config.json; empty where the key is missing or null."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise AnalysisError(f"adapter_config.json: {key} must be an object, got {value!r}")
    return {name: number(value, name) for name in value}


def needed_number(config: Config, key: str) -> float:
    """A number of adapter_config.json without which the update cannot be computed."""
    return number(_having(config, key), key)


def needed_count(config: Config, key: str) -> int:
    """A positive whole number of adapter_config.json without which the update cannot be computed."""
    return count(_having(config, key)[key], key)


def count(value: Any, key: str) -> int:
    """``value``, if it is a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AnalysisError(f"adapter_config.json: {key} must be a positive whole number, got {value!r}")
    return value


def by_pattern(config: Config, key: str, name: str, default: float) -> float:
    """The value of a module in ``rank_pattern`` or ``alpha_pattern``, as PEFT's get_pattern_key finds it."""
    known = _patterns.get((id(config), key))
    if known is None or known[0] is not config:
        if len(_patterns) >= _MOST_KEPT:
            _patterns.clear()
        known = _patterns[id(config), key] = config, Patterns(table(config, key))
    return known[1].get(name, default)


def peft_scaling(config: Config, name: str, rank: int | None, tensor: str) -> float:
    """alpha / r of a module by adapter_config.json; ``rank`` is that of ``tensor``, where it tells it."""
    r = by_pattern(config, "rank_pattern", name, needed_number(config, "r"))
    alpha = by_pattern(config, "alpha_pattern", name, needed_number(config, "alpha"))
    if r <= 0:
        raise AnalysisError(f"adapter_config.json: r must be positive, got {r:g}")
    check_rank(tensor, rank, r)
    return alpha / r


def check_rank(tensor: str, rank: int | None, said: float | None, scale: str = "") -> None:
    """Raise AnalysisError if a tensor has another rank than adapter_config.json says; None: nothing tells it."""
    if None not in (rank, said) and rank != said:
        raise AnalysisError(
            f"tensor {tensor} has rank {rank}, adapter_config.json says {said:g}{scale}; "
            "is it the config of another adapter?"
        )


def _having(config: Config, key: str) -> Config:
    if config.get(key) is None:
        raise AnalysisError(
            f"adapter_config.json: {key} is missing; without it the update cannot be computed: "
            "use the file that was saved with the weights"
        )
    return config
