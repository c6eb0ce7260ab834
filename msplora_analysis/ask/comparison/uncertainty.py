"""How sure a difference between two methods is: t intervals within tasks, and exact tests of all rows at once.

Pure functions of arrays; ``compare`` says what they are about. Rows are what is asked: measures, pairs of layers.

- The interval of a row is a t interval of a mean over tasks, whose variance is that of runs *within* tasks; degrees of
  freedom by Satterthwaite 1946, Biometrics Bulletin 2.
- A decision holds for all rows at once: how often does the largest |t| of any row reach this one's, if the labels of
  the methods mean nothing (max-T with steps down: Westfall & Young 1993, Resampling-Based Multiple Testing)? The labels
  of a pair of runs are swapped by the sign of its difference.

docs/statistics.md has how often these err, by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations, permutations, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.measures.metrics import Array

LEVEL = 0.05  # at most this share of comparisons of equal methods decides anything
EXACT = 2**14  # up to so many ways to relabel the runs, all are tried
DRAWS = 9999  # of more ways, so many are drawn at random
_BLOCK = 2**22  # values of relabelled samples at once
_ROUNDING = 1e-12  # relative: an error below it is none

Integers = NDArray[np.integer[Any]]


class Sample(NamedTuple):
    """One value of every row for each run: of a pair of runs, their difference.

    values: (n, rows). strata: (n,) the task of each. sides: (n,) 1 for the first method and -1 for the other where runs
    are not paired; of pairs all 1.
    """

    values: Array
    strata: Integers
    sides: Integers

    @property
    def paired(self) -> bool:
        return bool((self.sides == 1).all())


class Estimate(NamedTuple):
    """mean, its standard error and degrees of freedom, (rows,) each; NaN where one run alone cannot tell them."""

    mean: Array
    error: Array
    freedom: Array

    @property
    def t(self) -> Array:
        """mean / error; 0 where both are rounding."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t: Array = np.where(np.abs(self.mean) > 0, self.mean / self.error, np.where(self.error >= 0, 0.0, np.nan))
        return t

    def interval(self, confidence: float) -> tuple[Array, Array]:
        """Lower and upper end, (rows,) each."""
        from scipy.stats import t

        reach = np.where(self.error > 0, t.ppf((1 + confidence) / 2, self.freedom) * self.error, self.error)
        return self.mean - reach, self.mean + reach


def sample(values: Array, tasks: list[Any], sides: Integers | None = None) -> Sample:
    """A sample with a stratum for each task; one for all where a task has a single run of a method.

    values: (n, rows). tasks: (n,) names. sides: see ``Sample``; None for pairs.
    """
    sides = np.ones(len(values), dtype=int) if sides is None else sides
    strata = np.unique([str(task) for task in tasks], return_inverse=True)[1]
    counts = [(strata[sides == side] == one).sum() for side in np.unique(sides) for one in np.unique(strata)]
    return Sample(values, strata if min(counts, default=0) > 1 else np.zeros_like(strata), sides)


def estimate(of: Sample) -> Estimate:
    """The mean over tasks, each of equal weight, of what runs have; of two methods the difference of these means."""
    found = _estimate(*of)
    size = np.abs(of.values).max(axis=0, initial=0)
    return Estimate(_rounded(found.mean, size), _rounded(found.error, size), found.freedom)


def _rounded(values: Array, size: Array) -> Array:
    return np.where(np.abs(values) <= _ROUNDING * size, 0.0, values)


def _estimate(values: Array, strata: Integers, sides: Integers) -> Estimate:
    """values: (..., n, rows), sides: (..., n), either of them for many relabelled samples."""
    means, variances, freedoms = [], [], []
    names = np.unique(strata)
    for name in names:
        here = strata == name
        inside = values[..., here, :]
        for side in np.unique(sides):
            of = (sides[..., here] == side)[..., None]
            count = of.sum(axis=-2)
            mean = np.where(of, inside, 0).sum(axis=-2) / count
            squares = np.where(of, (inside - mean[..., None, :]) ** 2, 0).sum(axis=-2)
            with np.errstate(divide="ignore", invalid="ignore"):
                variances.append(squares / (count - 1) / count)
            means.append(side * mean)
            freedoms.append(count - 1)
    total = sum(variances)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = total**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
    return Estimate(sum(means) / len(names), np.sqrt(total) / len(names), freedom)


def least_p(of: Sample) -> float:
    """The smallest p-value that any data of this many runs could have."""
    ways = _count(of)
    alike = 2 if of.paired or all(of.sides[of.strata == name].sum() == 0 for name in np.unique(of.strata)) else 1
    return alike / ways if _all_tried(of) else 1 / (DRAWS + 1)


def p_values(of: Sample, *, seed: int = 0) -> Array:
    """For each row, how often relabelled runs have a row as far out: corrected for all rows, two-sided.

    Pairs of runs swap their labels, which is the sign of their difference: all 2^(n - 1) ways up to n = 15, else
    ``DRAWS`` random ones of ``seed``. Runs without pairs swap labels within their task.

    Returns:
        (rows,), NaN for a row that is not known for all runs. With all ways tried and symmetric values under the null
        hypothesis, that any row is at most p has probability at most p.
    """
    known = np.isfinite(of.values).all(axis=0)
    p = np.full(of.values.shape[1], np.nan)
    if known.any() and least_p(of) < 1:
        of = of._replace(values=of.values[:, known])
        p[known] = step_down(np.abs(estimate(of).t), np.concatenate(list(_relabelled(of, seed))))
    return p


def step_down(observed: Array, null: Array) -> Array:
    """p-values (rows,) of observed |t| (rows,) among those of relabelled data (draws, rows), for all rows at once."""
    order = np.argsort(-observed, kind="stable")
    largest = np.maximum.accumulate(null[:, order[::-1]], axis=1)[:, ::-1]
    p = np.empty(len(observed))
    p[order] = np.maximum.accumulate((largest >= observed[order] * (1 - 1e-9)).mean(axis=0))
    return p


def _relabelled(of: Sample, seed: int) -> Iterator[Array]:
    """|t| (draws, rows) of the data as they are and of others, in blocks."""
    labels = _labels(of, np.random.default_rng(seed))
    size = np.abs(of.values).max(axis=0, initial=0)
    step = max(1, _BLOCK // of.values.size)
    for start in range(0, len(labels), step):
        some = labels[start : start + step]
        found = (
            _estimate(some[..., None] * of.values, of.strata, of.sides)
            if of.paired
            else _estimate(of.values, of.strata, some)
        )
        yield np.abs(Estimate(_rounded(found.mean, size), _rounded(found.error, size), found.freedom).t)


def _count(of: Sample) -> int:
    """In how many ways the runs can be relabelled."""
    if of.paired:
        return 2 ** len(of.sides)
    return math.prod(math.comb(len(sides), int((sides == 1).sum())) for sides in _by_stratum(of, of.sides))


def _by_stratum(of: Sample, values: Integers) -> list[Integers]:
    return [values[of.strata == name] for name in np.unique(of.strata)]


def _all_tried(of: Sample) -> bool:
    return _count(of) <= EXACT * (2 if of.paired else 1)  # of pairs, the mirrored ways have the same |t|


def _labels(of: Sample, rng: np.random.Generator) -> Integers:
    """Labels 1 and -1 (draws, n) of relabelled runs, among them those of the data."""
    n = len(of.sides)
    if of.paired:
        if _all_tried(of):
            return 1 - 2 * (np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1)
        return np.concatenate([np.ones((1, n), dtype=int), rng.choice([1, -1], (DRAWS, n))])
    if _all_tried(of):
        places = _by_stratum(of, np.arange(n))
        chosen = product(*(combinations(place, int((of.sides[place] == 1).sum())) for place in places))
        labels = np.full((_count(of), n), -1)
        for row, of_each in enumerate(chosen):
            labels[row, np.concatenate(of_each).astype(int)] = 1
        return labels
    labels = np.tile(of.sides, (DRAWS + 1, 1))
    for place in _by_stratum(of, np.arange(n)):
        labels[1:, place] = rng.permuted(labels[1:, place], axis=1)
    return labels


def pseudo_values(values: Array, weights: Array, statistic: Callable[[Array], Array]) -> Array:
    """One value a run of a statistic of the runs' mean: what each adds to it.

    These are pseudo-values of the jackknife (Tukey 1958, Annals of Mathematical Statistics 29), moved so that their
    mean is the statistic itself. Of a linear statistic they are each run's own value, exactly.

    Args:
        values: (n, ...), of each run.
        weights: (n,), of the mean; their sum is 1.
        statistic: Of means (..., as one of ``values``), to (..., rows).

    Returns:
        (n, rows).
    """
    n = len(values)
    mean = np.tensordot(weights, values, axes=1)
    whole = statistic(mean[None])
    if n == 1:
        return whole
    # The mean without a run; it is not below 0 where weights are equal.
    others = np.maximum(mean - (values - mean) / (n - 1), 0)
    found = n * whole - (n - 1) * statistic(others)
    centred: Array = found + (whole - weights @ found)
    return centred


def neighbours(count: int) -> Array:
    """Which pairs (count, count) are of neighbours, as 0 and 1."""
    return np.eye(count, k=1) + np.eye(count, k=-1)


def adjacent_test(matrices: Array, *, seed: int = 0) -> tuple[Array, Array, Array]:
    """Means over neighbours and over all other pairs of layers, and the p-value of their difference, of several tables.

    matrices: (m, L, L) of what pairs of layers have, in the order of the layers; NaN is left out. The null hypothesis:
    the order of the layers has no bearing on any of them. Layers are permuted, not pairs, since the pairs of one layer
    are not independent of one another (Mantel 1967, Cancer Research 27). All L! orders are tried up to L = 7, else
    ``DRAWS`` random ones. The p-values (m,) are two-sided and corrected for all tables; NaN below three layers.
    """
    alike = (matrices + matrices.swapaxes(-1, -2)) / 2
    n = alike.shape[-1]
    alike[:, np.arange(n), np.arange(n)] = np.nan
    known, values = np.isfinite(alike), np.nan_to_num(alike)
    total, count = values.sum(axis=(-2, -1)) / 2, known.sum(axis=(-2, -1)) / 2

    def means(orders: Integers) -> tuple[Array, Array]:
        i, j = orders[:, :-1], orders[:, 1:]
        near, of_near = values[:, i, j].sum(axis=-1).T, known[:, i, j].sum(axis=-1).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return near / of_near, (total - near) / (count - of_near)

    near, far = (side[0] for side in means(np.arange(n)[None]))
    p = np.full(len(matrices), np.nan)
    testable = np.isfinite(near - far)
    if n < 3 or not testable.any():
        return near, far, p
    rng = np.random.default_rng(seed)
    orders = (
        np.array(list(permutations(range(n))))
        if math.factorial(n) <= EXACT
        else np.concatenate([np.arange(n)[None], rng.permuted(np.tile(np.arange(n), (DRAWS, 1)), axis=1)])
    )
    nulls = np.concatenate([np.subtract(*means(some)) for some in np.array_split(orders, -(-len(orders) // 1024))])
    nulls = nulls[:, testable]
    centre, spread = np.nanmean(nulls, axis=0), np.nanstd(nulls, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        away = np.nan_to_num(np.abs(nulls - centre) / spread)
    p[testable] = step_down(away[0], away)
    return near, far, p
