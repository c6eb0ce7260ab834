"""What a run is, and how its training went: from run.json, trainer_state.json and adapter_config.json beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.layouts import nearest_json, settings_of
from msplora_analysis.adapters.logs import Curve, curves, is_evaluation, trainer_log
from msplora_analysis.ask.comparison.pairing import units
from msplora_analysis.errors import printable
from msplora_analysis.tables.checkpoints import newest
from msplora_core.names import RECORD

POINTS = 400
"""Most points of a curve: more cannot be told apart on a screen."""

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
    curve = {name: points for key, points in trainer_log(last).items() if (name := _in_log(key))}
    curve = curve or {_RESULTS[key]: points for key, points in curves(record.get("results")).items() if key in _RESULTS}
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


def _in_log(key: str) -> str | None:
    """The losses, and all evaluations but their speed."""
    if key in _LOSSES:
        return _LOSSES[key]
    return key.removeprefix("eval_").replace("_", " ") if is_evaluation(key) else None


def _thinned(points: Curve) -> Curve:
    if len(points) <= POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return printable(f"{value:g}" if isinstance(value, float) else str(value))
