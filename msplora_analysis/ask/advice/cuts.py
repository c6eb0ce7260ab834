"""Cuts that gates price: every module to one rank, or each to its own, and what a pyramid's scales would need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from msplora_analysis.compute.choose import below_kl
from msplora_analysis.compute.measures.metrics import Array
from msplora_core.moments import ModuleMoments, Moments

Scores = NDArray[np.float32]


class Pattern(NamedTuple):
    """A rank for each module, what that costs in parameters, and in nats an example."""

    ranks: dict[str, int]
    parameters: int
    predicted_kl: float


def predicted(moments: Moments, scores: Sequence[Array]) -> float:
    """What ``ablate`` would measure of a cut, as far as the gates tell: KL, for regression the squared difference."""
    kl = moments.predicted_kl(np.sum(scores, axis=0))
    return 2 * kl if moments.is_regression else kl


def unit_of(moments: Moments | None) -> str:
    """What ``predicted`` counts, to stand behind its number."""
    return " (mean squared difference)" if moments is not None and moments.is_regression else " nats an example"


def beyond(moments: Moments, rank: int) -> list[Array] | None:
    """Of each module, the summed scores of its task directions beyond ``rank``; None where no scores are kept."""
    return _of_each(moments, "task", lambda module, scores: scores[:, rank:])


def whole(moments: Moments) -> list[Array] | None:
    """Of each module, the scores of its whole update."""
    return _of_each(moments, "plain", lambda module, scores: scores)


def of_scale(moments: Moments, scale: str, rank: int = 0) -> list[Array] | None:
    """Of each module with the scale, the scores of that scale's own task directions beyond ``rank``."""
    part = {name: module for name, module in moments.modules.items() if scale in module.scales}
    basis = "scale_task" if rank else "scale_plain"
    chosen = Moments(part, moments.about)
    return _of_each(chosen, basis, lambda module, scores: scores[:, module.part(scale)][:, rank:])


def _of_each(moments: Moments, basis: str, columns: Callable[[ModuleMoments, Scores], Scores]) -> list[Array] | None:
    modules = moments.modules.values()
    if not modules or any(basis not in module.scores for module in modules):
        return None
    return [columns(module, module.scores[basis]).sum(axis=1, dtype=np.float64) for module in modules]


def pattern_below(moments: Moments, metrics: pd.DataFrame, nats: float) -> Pattern | None:
    """The ranks with the fewest parameters whose predicted KL stays below ``nats``; see ``compute.choose.below_kl``.

    Args:
        moments: With task scores.
        metrics: One row per whole update: name, rows, cols.
        nats: The most that the cut may cost, KL of classifiers and language models.
    """
    sizes = dict(zip(metrics["name"], metrics["rows"] + metrics["cols"], strict=True))
    served: dict[str, ModuleMoments] = {name: module for name, module in moments.modules.items() if name in sizes}
    if any("task" not in module.scores for module in served.values()) or len(served) < len(sizes):
        return None
    costs = [int(sizes[name]) for name in served]
    draws = int(moments.about.get("draws", 1))
    examples = len(next(iter(served.values())).scores["task"]) // draws
    if examples < 2:
        return None
    cut = below_kl([module.scores["task"] for module in served.values()], costs, nats, draws)
    parameters = sum(rank * cost for rank, cost in zip(cut.ranks, costs, strict=True))
    return Pattern(dict(zip(served, cut.ranks, strict=True)), parameters, cut.predicted)
