"""Which checkpoint of a run to keep: the metric over the epochs decides, moments say how much still changed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from msplora_analysis.ask.advice.subject import Answer, Subject, as_word, whole_updates
from msplora_analysis.ask.advice.training import Course

LOSS = 0.01
"""Of the metric that may be lost, where it was measured."""
SETTLED = 0.05
"""By how much of the last norm those of checkpoints differ that changed little."""
_QUESTION = "Which checkpoint?"


def which(subject: Subject, course: Course | None) -> list[Answer]:
    """The answer, if anything is known of several checkpoints.

    Args:
        subject: The adapter, with the other checkpoints of its run.
        course: The metric over the run.
    """
    moved = over_training(subject.history)
    if course is None or len(course.points) < 3:
        if len(moved) < 2:
            return []
        evidence = _moved(moved, None)
        sure = "Moments tell how much changed, not which checkpoint is better. Measure the metric of each."
        measure = f"msplora-measure ablate {subject.path}"
        return [Answer(_QUESTION, "Nothing here measured the metric over the epochs.", evidence, sure, measure)]
    (best_at, best), (last_at, last) = course.best, course.points[-1]
    ahead = (best - last) * (1 if course.greater_is_better else -1)
    error = course.standard_error(best)
    needed = max(LOSS, error or 0)
    keeps_last = ahead <= needed
    evidence = f"{course.metric} {last:.3f} at the last epoch ({last_at:g}), {best:.3f} at its best ({best_at:g}). "
    evidence += _losses(course) + _moved(moved, None if keeps_last else best_at)
    sure = "The best of many on the same data is best partly by chance"
    if error is not None:
        sure += f": one standard error is {error:.2g} with {course.examples:,} examples"
    sure += f". Another than the last is named if it is more than {needed:.2g} better."
    if keeps_last:
        return [Answer(_QUESTION, "The last.", evidence.rstrip(), sure, value=last_at)]
    found = [one for one in subject.checkpoints if one.epoch == best_at]
    command = f"msplora-analyze advise {as_word(found[-1])}" if found else None
    missing = ", which is not here" if not found and len(subject.checkpoints) > 1 else ""
    answer = f"That of epoch {best_at:g}{missing}."
    return [Answer(_QUESTION, answer, evidence.rstrip(), sure, command, best_at)]


def over_training(history: pd.DataFrame) -> pd.DataFrame:
    """What the task weighs of each checkpoint that changed anything.

    Args:
        history: Rows of the metrics of several checkpoints, with moments.

    Returns:
        A row for each checkpoint, in order: step, epoch, norm (of all updates together), effective_rank (mean over
        modules), both task-weighted. Empty without moments.
    """
    if history.empty or "task_norm" not in history:
        return pd.DataFrame(columns=["step", "epoch", "norm", "effective_rank"])
    known = whole_updates(history[history["task_norm"].notna()])
    by = known.assign(square=known["task_norm"].astype(float) ** 2).groupby(["step", "epoch"], dropna=False, sort=True)
    table = by.agg(square=("square", "sum"), effective_rank=("task_effective_rank", "mean")).reset_index()
    table["norm"] = np.sqrt(table.pop("square"))
    return table[table["norm"] > 0].reset_index(drop=True)


def _losses(course: Course) -> str:
    trained = [point for point in course.losses if point[0] > 0]
    if len(trained) < 2:
        return ""
    (least_at, least), (last_at, last) = min(trained, key=lambda point: point[1]), trained[-1]
    if least_at == last_at:
        return f"Validation loss is least at the last epoch ({last:.3f}). "
    return f"Validation loss {last:.3f} at the last, {least:.3f} at its least ({least_at:g}). "


def _moved(table: pd.DataFrame, chosen: float | None) -> str:
    """How the task-weighted norm and effective rank went: at the first checkpoint, the chosen and the last."""
    if len(table) < 2:
        return ""
    time = table["epoch"] if table["epoch"].notna().all() else table["step"]
    unit = "epoch" if table["epoch"].notna().all() else "step"
    rows = [0, *table.index[time == chosen], len(table) - 1]
    said = [
        f"{table['norm'][row]:.3g} ({table['effective_rank'][row]:.2f}) at {unit} {time[row]:g}"
        for row in dict.fromkeys(rows)
    ]
    close = (table["norm"] / table["norm"].iloc[-1] - 1).abs() <= SETTLED
    settled = int(close[::-1].cummin()[::-1].idxmax())
    text = f"Task-weighted norm (effective rank): {', '.join(said)}."
    if settled < len(table) - 1:
        text += f" From {unit} {time[settled]:g} on the norm is within {SETTLED:.0%} of the last."
    return text
