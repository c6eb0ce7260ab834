"""What a run is, and how its training went: from run.json, trainer_state.json and adapter_config.json beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.layouts import nearest_json, settings_of
from msplora_analysis.ask.comparison.pairing import units
from msplora_analysis.errors import printable
from msplora_analysis.tables.checkpoints import newest
from msplora_core.names import RECORD, STATE
from msplora_core.records import TRAINER_STATE

POINTS = 400
"""Most points of a curve: more cannot be told apart on a screen."""

_SPEED = ("_runtime", "_per_second")  # in the log of Trainer, no curves
_LOSSES = {"loss": "training loss", "eval_loss": "validation loss"}
_RESULTS = {"train_loss": "training loss", "validation_loss": "validation loss", "metric": "metric"}


@dataclass(frozen=True)
class About:
    """A run. folder: of its last checkpoint; empty for a run that a table holds. facts: name -> text, those that are
    known. record: groups of settings, versions and so on, for provenance. curve: name -> points (epoch or step, value).
    """

    run: str
    folder: str
    facts: Mapping[str, str]
    record: Mapping[str, Mapping[str, str]]
    curve: Mapping[str, Sequence[tuple[float, float]]]
    is_thinned: bool = False


def about(run: str, adapters: Sequence[Adapter]) -> About:
    """``adapters``: those of the run, in order; none if it comes from a table.

    Raises AnalysisError for a JSON file that is broken.
    """
    unit = units([run], adapters)[0]
    if not adapters:
        return About(run, "", _facts(unit.task, unit.seed, {}, {}, 0), {}, {})
    (last,) = newest(adapters)
    record = nearest_json(last.file, RECORD)
    curve = _curves(nearest_json(last.file, STATE, TRAINER_STATE).get("log_history"), _in_log)
    curve = curve or _curves(record.get("results"), _RESULTS.get)
    longest = max(map(len, curve.values()), default=0)
    return About(
        run,
        printable(str(last.file.parent)),
        _facts(unit.task, unit.seed, record, last.config, len(adapters)),
        _record(record, last.config),
        {name: _thinned(points) for name, points in curve.items()},
        longest > POINTS,
    )


def _facts(
    task: str | None, seed: int | None, record: dict[str, Any], config: dict[str, Any], count: int
) -> dict[str, str]:
    settings, model, parameters = settings_of(record), _object(record.get("model")), _object(record.get("parameters"))
    known = {
        "method": settings.get("method") or config.get("peft_type"),
        "model": settings.get("model") or model.get("name") or config.get("base_model_name_or_path"),
        "task": task or config.get("task_type"),
        "seed": seed,
        "checkpoints": count or None,
        "adapter parameters": f"{n:,}" if isinstance(n := parameters.get("adapter"), int) else None,
        "modules": config.get("target_modules"),
    }
    return {name: _text(value) for name, value in known.items() if value is not None}


def _record(record: dict[str, Any], config: dict[str, Any]) -> dict[str, dict[str, str]]:
    groups = {name: value for name, value in record.items() if isinstance(value, dict)}
    groups["other"] = {name: v for name, v in record.items() if not isinstance(v, (dict, list))}
    groups["adapter_config.json"] = {name: value for name, value in config.items() if value is not None}
    return {
        name: {key: _text(value) for key, value in group.items() if value is not None}
        for name, group in groups.items()
        if group
    }


def _curves(entries: Any, called: Callable[[str], str | None]) -> dict[str, list[tuple[float, float]]]:
    """Of what was logged or found at several times; ``called`` has the name of a curve, None for what is none."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in entries if isinstance(entries, list) else ():
        for key, value in _object(entry).items():
            name, when = called(key), entry.get("epoch", entry.get("step"))
            if name and _is_number(when) and _is_number(value):
                curves.setdefault(name, []).append((when, value))
    return curves


def _in_log(key: str) -> str | None:
    """The losses, and all evaluations but their speed."""
    if key in _LOSSES:
        return _LOSSES[key]
    measured = key.startswith("eval_") and not key.endswith(_SPEED)
    return key.removeprefix("eval_").replace("_", " ") if measured else None


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> TypeGuard[float]:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return printable(f"{value:g}" if isinstance(value, float) else str(value))
