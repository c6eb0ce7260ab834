"""What a run is: its run.json, as ``msplora-train`` writes it."""

from __future__ import annotations

from typing import Any

from msplora_analysis.adapters.layouts import nearest_json, read_json
from msplora_analysis.files.addresses import Place
from msplora_core.names import RECORD


def read_record(run: Place) -> dict[str, Any]:
    """The record in a run's folder. Raises AnalysisError for a file that holds no JSON object."""
    return read_json(run / RECORD)


def record_of(adapter: Place) -> dict[str, Any]:
    """The nearest record above an adapter's file; empty without one."""
    return nearest_json(adapter, RECORD)


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """What the run was trained with: task, seed, method, rank, ...; empty where the record does not say."""
    settings = record.get("settings")
    return settings if isinstance(settings, dict) else {}
