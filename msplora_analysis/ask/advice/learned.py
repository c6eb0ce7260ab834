"""Whether a training learned anything: what the weights, the moments and the recorded losses say."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.ask.advice.cuts import predicted, unit_of, whole
from msplora_analysis.ask.advice.training import course_of, training_losses

if TYPE_CHECKING:
    from msplora_core.moments import Moments

NOTHING = 1e-3
"""Nats an example below which leaving out a whole adapter, or a scale, changes next to nothing."""
FALL = 0.05
"""The share of its first epoch's training loss that a classifier loses at least, if it learns.

Of 353 trainings (ten methods, six tasks, two models) six lose less, none more than 0.04 above its majority class.
"""
CORRELATION = 0.1
"""A correlation of the outputs with the labels below which they explain less than a hundredth of them (0.1² = 0.01)."""
EPOCHS = 3
"""From how many epochs on a loss that does not fall, or a metric that does not grow, says something."""


class Learned(NamedTuple):
    """``value``: None where nothing tells. ``number`` was held against ``threshold``; both NaN where nothing was."""

    value: bool | None
    answer: str
    evidence: str = ""
    number: float = float("nan")
    threshold: float = float("nan")


def learned(adapter: Adapter, moments: Moments | None, *, is_zero: bool) -> Learned:
    """Whether one adapter learned anything.

    Args:
        adapter: For the record of its run.
        moments: Those of the adapter, or None.
        is_zero: Whether every update is zero.
    """
    if is_zero:
        return Learned(False, "No: every update is zero.", "", 0.0, 0.0)
    moved = None
    evidence = []
    if moments is not None and (scores := whole(moments)) is not None:
        moved = predicted(moments, scores)
        evidence.append(f"Without it the outputs move by about {moved:.2g}{unit_of(moments)} (predicted).")
        if moved <= NOTHING:
            return Learned(False, "Next to nothing.", evidence[0], moved, NOTHING)
    course = course_of(adapter)
    if course is not None and course.is_correlation and course.has(adapter.epoch):
        when, correlation = course.at(adapter.epoch)
        if when >= EPOCHS and correlation < CORRELATION:
            evidence.append(f"The {course.metric} is {correlation:.3g}.")
            answer = "Hardly: its outputs do not follow the labels."
            return Learned(False, answer, " ".join(evidence), correlation, CORRELATION)
    losses = training_losses(adapter) if is_classifier(adapter) else []
    if len(losses) >= EPOCHS and losses[0] > 0:
        fall = 1 - losses[-1] / losses[0]
        evidence.append(f"The training loss went from {losses[0]:.3g} in the first epoch to {losses[-1]:.3g}.")
        if fall < FALL:
            return Learned(False, "Hardly: its training loss did not fall.", " ".join(evidence), fall, FALL)
    if moved is None:
        answer = "It changed the weights. Whether that serves the task, weights alone do not tell."
        return Learned(None, answer, " ".join(evidence))
    return Learned(True, "Yes.", " ".join(evidence), moved, NOTHING)


def is_classifier(adapter: Adapter) -> bool:
    """Whether it is a classifier's (a regression's): its head begins from nothing, so that its loss must fall."""
    return adapter.config.get("task_type") == "SEQ_CLS"
