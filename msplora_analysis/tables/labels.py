"""When and where something is, in words. A row is any mapping with the key columns of the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msplora_analysis.errors import printable

if TYPE_CHECKING:
    import pandas as pd


def when(row: Mapping[str, object], otherwise: str = "") -> str:
    """'epoch 3', else 'step 40'; ``otherwise`` for a row that has neither."""
    return next((f"{name} {row[name]:g}" for name in ("epoch", "step") if _has(row, name)), otherwise)


def where(row: Mapping[str, object]) -> str:
    """'layer 3 query', 'mid 0 value', or the name of what is in no numbered layer; 'the run' for none of them."""
    unit = f"{row['scale']}" if _has(row, "scale") else ""
    if _has(row, "group"):
        unit += f" {row['group']}"
    module = next((row[name] for name in ("module", "name") if _has(row, name)), "")
    return printable(f"{unit} {module}".strip()) or "the run"


def epoch_note(epochs: pd.Series) -> str:
    """'epoch 20', or 'last checkpoint' where there is no one epoch to name."""
    known = epochs.dropna().unique()
    is_one = len(known) == 1 and epochs.notna().all()
    return when({"epoch": known[0] if is_one else None}, "last checkpoint")


def _has(row: Mapping[str, Any], name: str) -> bool:
    import pandas as pd

    return name in row and not pd.isna(row[name])
