"""How sure a mean over few runs is: bootstrap intervals over runs, and a permutation test over layers.

Pure functions of arrays; ``compare`` says what they are about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from msplora_analysis.compute.measures.metrics import Array

RESAMPLES = 4999
_BYTES = 2**26  # of weights times ``size`` at once

Statistic = Callable[[Array], Array]
"""Weights of the runs (..., n) -> values (...)."""


def interval(
    statistic: Statistic,
    strata: Sequence[Array],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    size: int = 1,
) -> tuple[float, float]:
    """Bootstrap interval (BCa: Efron 1987, JASA 82) of a statistic of weighted runs; NaN if nothing can be drawn anew.

    strata: what is drawn, each stratum by itself and as many as it has: arrays (clusters, n) with
    the weights that a cluster of runs brings. size: float64 values that ``statistic`` holds per
    resample.

    Where all resamples agree, so do both ends.
    """
    if not strata or min(len(stratum) for stratum in strata) < 2:
        return float("nan"), float("nan")
    from scipy.stats import bootstrap

    # BCa counts how many resamples lie below the estimate. With few runs some are equal to it: their
    # rounding must not decide. What the statistic moves by with one cluster less sets the unit.
    whole = np.sum([stratum.sum(axis=0) for stratum in strata], axis=0)
    spread = float(np.ptp(statistic(whole - np.concatenate(strata))))
    point = float(statistic(whole[None])[0])
    if not spread > 1e-12 * abs(point):
        return point, point
    unit = 1e-9 * spread

    def of_draws(*draws: Any, axis: int = -1) -> Array:
        drawn = [np.moveaxis(np.asarray(draw), axis, -1) for draw in draws]
        weights: Any = 0.0
        for draw, stratum in zip(drawn, strata, strict=True):
            # How often each cluster was drawn.
            counts = (draw[..., None] == np.arange(len(stratum))).sum(axis=-2)
            weights = weights + counts @ stratum
        rounded: Array = np.round(statistic(weights) / unit) * unit
        return rounded

    runs = strata[0].shape[1]
    options: dict[str, Any] = {
        "batch": max(1, _BYTES // (8 * max(size, runs * runs))),
        "vectorized": True,
        "paired": False,
        "confidence_level": confidence,
        "random_state": np.random.default_rng(seed),
    }
    data = tuple(np.arange(len(stratum)) for stratum in strata)
    plain = bootstrap(data, of_draws, method="percentile", n_resamples=resamples, **options)
    best = bootstrap(data, of_draws, method="BCa", n_resamples=0, bootstrap_result=plain, **options)
    low, high = best.confidence_interval
    if not np.isfinite([low, high]).all():  # every resample on one side of the estimate
        low, high = plain.confidence_interval
    return float(low), float(high)


def neighbours(count: int) -> Array:
    """Which pairs (count, count) are of neighbours, as 0 and 1."""
    return np.eye(count, k=1) + np.eye(count, k=-1)


def adjacent_test(matrix: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """Mean over neighbours, mean over all other pairs, and the two-sided p-value of their difference.

    matrix: (L, L) of what pairs of layers have, in the order of the layers; NaN is left out. The null hypothesis: the
    order of the layers has no bearing on it. Layers are permuted, not pairs, since the pairs of one layer are not
    independent of one another (Mantel 1967, Cancer Research 27). All L! orders are taken if ``resamples`` allows.
    """
    from scipy.stats import permutation_test

    n = len(matrix)
    alike = (matrix + matrix.T) / 2
    np.fill_diagonal(alike, np.nan)
    known, values = np.isfinite(alike), np.nan_to_num(alike)
    total, count = values.sum() / 2, known.sum() / 2

    def means(order: Any) -> tuple[Any, Any]:
        i, j = order[..., :-1], order[..., 1:]
        near, of_near = values[i, j].sum(axis=-1), known[i, j].sum(axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return near / of_near, (total - near) / (count - of_near)

    def statistic(order: Any, axis: int = -1) -> Any:
        near, far = means(np.moveaxis(np.asarray(order), axis, -1))
        return near - far

    near, far = means(np.arange(n))
    if n < 3 or not np.isfinite(near - far):
        return float(near), float(far), float("nan")
    result = permutation_test(
        (np.arange(n),),
        statistic,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=resamples,
        batch=1024,
        random_state=np.random.default_rng(seed),
    )
    return float(near), float(far), float(result.pvalue)
