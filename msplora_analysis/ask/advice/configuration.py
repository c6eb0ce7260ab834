"""A configuration to paste: PEFT's LoraConfig, or MSPLoraConfig, with ranks that an adapter turned out to use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def lora_config(config: Mapping[str, Any], rank: int, pattern: Mapping[str, int] | None = None) -> str | None:
    """A LoraConfig whose scaling is that of the adapter, alpha / r, at every rank.

    Args:
        config: The adapter's adapter_config.json.
        rank: Of the modules that the pattern does not name.
        pattern: Module to its own rank.

    Returns:
        Python, or None where the config tells no scaling or modules.
    """
    r, alpha, modules = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if not _is_number(r) or not _is_number(alpha) or not r or not modules:
        return None
    scaling = alpha / r if not config.get("use_rslora") else alpha / r**0.5
    ranks = {f"^{re.escape(name)}": k for name, k in (pattern or {}).items() if k != rank}
    alphas = {name: _plain(scaling * k) for name, k in ranks.items()}
    lines = [f"r={rank}", f"lora_alpha={_plain(scaling * rank)}", f"target_modules={_modules(modules)}"]
    lines += [f"rank_pattern={ranks!r}", f"alpha_pattern={alphas!r}"] if ranks else []
    return "LoraConfig(\n    " + ",\n    ".join(lines) + ",\n)"


def msplora_config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> str | None:
    """An MSPLoraConfig with these ranks; a scale of rank 0 does not exist."""
    alpha, modules = config.get("lora_alpha"), config.get("target_modules")
    kept = {scale: rank for scale, rank in ranks.items() if rank}
    if not kept or not modules or not _is_number(alpha):
        return None
    return f"MSPLoraConfig(\n    ranks={kept!r},\n    lora_alpha={alpha},\n    target_modules={_modules(modules)},\n)"


def _modules(modules: Any) -> str:
    return repr(sorted(map(str, modules)) if isinstance(modules, (list, set, tuple)) else str(modules))


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else round(value, 6)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
