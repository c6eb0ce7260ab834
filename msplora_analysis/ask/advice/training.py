"""What a run's own records say: how the metric went, epoch by epoch."""

from __future__ import annotations

from typing import Any, NamedTuple

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.layouts import nearest_json
from msplora_analysis.adapters.logs import Curve, curves, is_evaluation, trainer_log
from msplora_core.names import RECORD
from msplora_core.records import Schema, fits

_METRIC: Schema = {"name": str, "greater_is_better": bool}  # of a run.json, which may be another program's
_STEP: Schema = {"step": float, ...: object}


class Course(NamedTuple):
    """The metric over a training: ``points`` of (epoch or step, value), before training first if it was measured."""

    metric: str
    greater_is_better: bool
    points: Curve

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
    points = curves(_of_its_rank(record)).get("metric")
    if not points:
        log = {key: points for key, points in trainer_log(adapter).items() if is_evaluation(key)}
        key = next((key for key in log if key != "eval_loss"), next(iter(log), ""))  # its loss where nothing else is
        name, greater, points = key.removeprefix("eval_"), not key.endswith("loss"), log.get(key)
    if not points:
        return None
    return Course((name or "metric").replace("_", " ").capitalize(), greater, points)


def _of_its_rank(record: dict[str, Any]) -> Any:
    """The results of a run, without those between its first step and the last cut of its rank."""
    results: Any = record.get("results")
    cuts: Any = record.get("cuts")
    if not cuts or not (fits(cuts, [_STEP]) and fits(results, [_STEP])):
        return results
    last = max(cut["step"] for cut in cuts)
    return [result for result in results if result["step"] == 0 or result["step"] >= last]
