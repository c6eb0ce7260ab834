"""What trainers logged, value by value: the log of Trainer, and the results of a run.json."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.layouts import nearest_json
from msplora_core.names import STATE
from msplora_core.records import TRAINER_STATE

Curve = list[tuple[float, float]]
"""Points of (epoch, or step without epochs; value)."""

_SPEED = ("_runtime", "_per_second")  # of an evaluation


def trainer_log(adapter: Adapter) -> dict[str, Curve]:
    """What the trainer_state.json beside an adapter, or above it, logged, by key.

    Raises:
        AnalysisError: the file is broken.
    """
    return curves(nearest_json(adapter.file, STATE, TRAINER_STATE).get("log_history"))


def curves(entries: Any) -> dict[str, Curve]:
    """The numbers in a list of objects of whatever file, by key; what is none is left out."""
    found: dict[str, Curve] = {}
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and _is_number(when := entry.get("epoch", entry.get("step"))):
            for key, value in entry.items():
                if _is_number(value):
                    found.setdefault(key, []).append((float(when), float(value)))
    return found


def is_evaluation(key: str) -> bool:
    """Whether a key of the log is what an evaluation found, and not how fast it was."""
    return key.startswith("eval_") and not key.endswith(_SPEED)


def _is_number(value: Any) -> TypeGuard[float]:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )
