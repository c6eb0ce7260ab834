"""When and where a finding is, in words; a row is any mapping with the key columns of the findings table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msplora_analysis.errors import printable


def when(row: Mapping[str, Any]) -> str:
    """'epoch 3', else 'step 40', else nothing."""
    return next((f"{name} {row[name]:g}" for name in ("epoch", "step") if _has(row, name)), "")


def where(row: Mapping[str, Any]) -> str:
    """'layer 3 query', 'mid 0 value', or the name of what is in no numbered layer; 'the run' for none of them."""
    unit = f"{row['scale']}" if _has(row, "scale") else ""
    if _has(row, "group"):
        unit += f" {row['group']}"
    module = next((row[name] for name in ("module", "name") if _has(row, name)), "")
    return printable(f"{unit} {module}".strip()) or "the run"


def _has(row: Mapping[str, Any], name: str) -> bool:
    import pandas as pd

    return name in row and not pd.isna(row[name])
