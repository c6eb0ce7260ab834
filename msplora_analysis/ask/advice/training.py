"""What a run's own records say: how the metric went, epoch by epoch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeGuard

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.layouts import nearest_json
from msplora_core.names import RECORD, STATE
from msplora_core.records import TRAINER_STATE, Schema, fits

_METRIC: Schema = {"name": str, "greater_is_better": bool}  # of a run.json, which may be another program's
_STEP: Schema = {"step": float, ...: object}


class Course(NamedTuple):
    """The metric over a training: ``points`` of (epoch or step, value), before training first if it was measured."""

    metric: str
    greater_is_better: bool
    points: list[tuple[float, float]]

    @property
    def best(self) -> tuple[float, float]:
        """The first epoch with the best value."""
        trained = [point for point in self.points if point[0] > 0] or self.points
        sign = 1 if self.greater_is_better else -1
        return max(trained, key=lambda point: sign * point[1])


def course_of(adapter: Adapter) -> Course | None:
    """From run.json, else from the log of Trainer; None where neither has a metric.

    Raises:
        AnalysisError: a JSON file beside the adapter is broken.
    """
    record = nearest_json(adapter.file, RECORD)
    metric: dict[str, Any] = record["metric"] if fits(record.get("metric"), _METRIC) else {}
    name, greater = metric.get("name"), metric.get("greater_is_better", True)
    points = _points(_of_its_rank(record), "metric")
    if not points:
        log = nearest_json(adapter.file, STATE, TRAINER_STATE).get("log_history")
        name = _logged(log)
        points, greater = (_points(log, name), not name.endswith("loss")) if name else ([], True)
        name = name.removeprefix("eval_") if name else None
    if not points:
        return None
    return Course((name or "metric").replace("_", " ").capitalize(), greater, points)


def _of_its_rank(record: dict[str, Any]) -> Any:
    """The results of a run, without those between its first step and the last cut of its rank."""
    results, cuts = record.get("results"), record.get("cuts")
    if not cuts or not (fits(cuts, [_STEP]) and fits(results, [_STEP])):
        return results
    last = max(cut["step"] for cut in cuts)
    return [result for result in results if result["step"] == 0 or result["step"] >= last]


def _points(entries: Any, key: str) -> list[tuple[float, float]]:
    found = []
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            when, value = entry.get("epoch", entry.get("step")), entry.get(key)
            if _is_number(when) and _is_number(value):
                found.append((float(when), float(value)))
    return found


def _logged(log: Any) -> str | None:
    """What Trainer evaluated, its loss only where there is nothing else."""
    keys = [key for entry in log if isinstance(entry, dict) for key in entry] if isinstance(log, list) else []
    of_metric = [k for k in keys if str(k).startswith("eval_") and not k.endswith(("_runtime", "_per_second"))]
    return next((key for key in of_metric if key != "eval_loss"), next(iter(of_metric), None))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
