"""What a run's own records say: how the metric and the losses went, epoch by epoch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.layouts import nearest_json
from msplora_analysis.adapters.logs import Curve, curves, is_evaluation, trainer_log
from msplora_core.names import RECORD
from msplora_core.records import Schema, fits

_METRIC: Schema = {"name": str, "greater_is_better": bool}  # of a run.json, which may be another program's
_STEP: Schema = {"step": float, ...: object}
_DATA: Schema = {"validation": {"rows": int, ...: object}, ...: object}


class Course(NamedTuple):
    """The metric over a training: ``points`` of (epoch or step, value), before training first if it was measured.

    ``losses``: those of the same evaluations, where they were recorded. ``examples``: how many they were on, if known.
    """

    metric: str
    greater_is_better: bool
    points: Curve
    losses: Curve = []  # noqa: RUF012  # never changed
    examples: int | None = None

    @property
    def is_correlation(self) -> bool:
        """Whether the metric is a correlation with the labels: 0 for outputs that do not depend on the input."""
        return any(word in self.metric.lower() for word in ("correlation", "matthews", "pearson", "spearman"))

    @property
    def best(self) -> tuple[float, float]:
        """The first epoch with the best value."""
        trained = [point for point in self.points if point[0] > 0] or self.points
        sign = 1 if self.greater_is_better else -1
        return max(trained, key=lambda point: sign * point[1])

    def has(self, epoch: float | None) -> bool:
        """Whether there is a point of an epoch, or before it."""
        return epoch is None or self.points[0][0] <= epoch

    def at(self, epoch: float | None) -> tuple[float, float]:
        """The last point of an epoch, or before it; the last of all where the epoch is not known."""
        return [point for point in self.points if epoch is None or point[0] <= epoch][-1:][0]

    def standard_error(self, value: float) -> float | None:
        """About how far chance moves the metric, as there are so many examples; None where that is not known.

        Of a share p it is √(p (1 − p) / n), of a correlation r about (1 − r²) / √n.
        """
        name = self.metric.lower()
        if not self.examples or not -1 <= value <= 1:
            return None
        if "accuracy" in name and value >= 0:
            return math.sqrt(value * (1 - value) / self.examples)
        if self.is_correlation:
            return (1 - value**2) / math.sqrt(self.examples)
        return None


def course_of(adapter: Adapter) -> Course | None:
    """From run.json, else from the log of Trainer; None where neither has a metric.

    Raises:
        AnalysisError: a JSON file beside the adapter is broken.
    """
    record = nearest_json(adapter.file, RECORD)
    metric: dict[str, Any] = record["metric"] if fits(record.get("metric"), _METRIC) else {}
    name, greater = metric.get("name"), metric.get("greater_is_better", True)
    recorded = curves(_of_its_rank(record))
    points, losses = recorded.get("metric"), recorded.get("validation_loss", [])
    examples = record["data"]["validation"]["rows"] if fits(record.get("data"), _DATA) else None
    if not points:
        log = {key: points for key, points in trainer_log(adapter).items() if is_evaluation(key)}
        key = next((key for key in log if key != "eval_loss"), next(iter(log), ""))  # its loss where nothing else is
        name, greater, points = key.removeprefix("eval_"), not key.endswith("loss"), log.get(key)
        losses = log.get("eval_loss", []) if key != "eval_loss" else []
    if not points:
        return None
    return Course((name or "metric").replace("_", " ").capitalize(), greater, points, losses, examples)


def training_losses(adapter: Adapter) -> list[float]:
    """The mean training loss of each epoch up to the adapter's, from run.json, else from the log of Trainer.

    Raises:
        AnalysisError: a JSON file beside the adapter is broken.
    """
    points = curves(_of_its_rank(nearest_json(adapter.file, RECORD))).get("train_loss")
    points = points or trainer_log(adapter).get("loss", [])
    epochs: dict[int, list[float]] = {}
    for when, loss in points:
        if adapter.epoch is None or when <= adapter.epoch:
            epochs.setdefault(math.ceil(when), []).append(loss)
    return [sum(losses) / len(losses) for losses in epochs.values()]


def _of_its_rank(record: dict[str, Any]) -> Any:
    """The results of a run, without those between its first step and the last cut of its rank."""
    results: Any = record.get("results")
    cuts: Any = record.get("cuts")
    if not cuts or not (fits(cuts, [_STEP]) and fits(results, [_STEP])):
        return results
    last = max(cut["step"] for cut in cuts)
    return [result for result in results if result["step"] == 0 or result["step"] >= last]
