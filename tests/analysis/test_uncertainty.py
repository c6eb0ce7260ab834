"""Intervals and tests of few runs: against scipy, against enumeration by hand, and by simulation."""

from __future__ import annotations

import importlib.util
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from msplora_analysis.ask.comparison.uncertainty import estimate, least_p, p_values, pseudo_values, sample


def test_one_task_of_pairs_is_the_paired_t_test() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    low, high = estimate(sample((a - b)[:, None], ["cola"] * 7)).interval(0.9)
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.9)
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high))


def test_one_task_of_runs_without_pairs_is_the_test_of_welch() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5), 3 * rng.normal(size=8)
    of = sample(np.concatenate([a, b])[:, None], [None] * 13, np.repeat([1, -1], [5, 8]))
    expected = scipy.stats.ttest_ind(a, b, equal_var=False)
    found = estimate(of)
    assert found.t[0] == pytest.approx(expected.statistic)
    assert found.freedom[0] == pytest.approx(expected.df)
    low, high = found.interval(0.95)
    assert (low[0], high[0]) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_tasks_have_equal_weight_and_do_not_widen_the_interval() -> None:
    x, y = np.array([1.0, 2, 3]), np.array([101.0, 103])
    found = estimate(sample(np.concatenate([x, y])[:, None], list("aaabb")))
    assert found.mean[0] == (2 + 102) / 2
    variances = [x.var(ddof=1) / 3, y.var(ddof=1) / 2]
    assert found.error[0] == pytest.approx(np.sqrt(sum(variances)) / 2)
    assert found.freedom[0] == pytest.approx(sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2))
    # A task with one pair says nothing of the spread within: all are one stratum.
    alone = estimate(sample(np.array([1.0, 2, 4])[:, None], list("aab")))
    assert alone.error[0] == pytest.approx(scipy.stats.sem([1, 2, 4]))


def test_p_values_are_those_of_all_signs() -> None:
    values = np.random.default_rng(1).normal(size=(6, 3)) + np.array([1.5, 0.3, 0])
    of = sample(values, ["x"] * 6)
    signs = [np.array(one)[:, None] for one in product((1, -1), repeat=6)]
    ts = np.array([np.abs(scipy.stats.ttest_1samp(values * one, 0).statistic) for one in signs])
    order = np.argsort(-ts[0])
    expected, before = {}, 0.0
    for place, which in enumerate(order):  # the largest of this row and those below it
        before = max(before, (ts[:, order[place:]].max(axis=1) >= ts[0, which] - 1e-9).mean())
        expected[which] = before
    assert p_values(of) == pytest.approx([expected[i] for i in range(3)])
    assert least_p(of) == 2 / 2**6


def test_p_values_without_pairs_are_those_of_all_labels_within_tasks() -> None:
    values = np.random.default_rng(1).normal(size=8) + np.array([2, 2, 0, 0, 12, 12, 10, 10])
    tasks, sides = list("aaaabbbb"), np.array([1, 1, -1, -1] * 2)
    of = sample(values[:, None], tasks, sides)

    def t(first: tuple[int, ...]) -> float:
        """Difference of means within each task, over the error by hand."""
        means, errors = [], []
        for task in range(2):
            here = set(range(4 * task, 4 * task + 4))
            x, y = (values[sorted(part)] for part in (here & set(first), here - set(first)))
            means.append(x.mean() - y.mean())
            errors += [x.var(ddof=1) / 2, y.var(ddof=1) / 2]
        return abs(sum(means)) / np.sqrt(sum(errors))

    ways = [t((*x, *y)) for x in combinations(range(4), 2) for y in combinations(range(4, 8), 2)]
    assert p_values(of)[0] == pytest.approx(np.mean(np.array(ways) >= t((0, 1, 4, 5)) - 1e-9))
    assert least_p(of) == 2 / 36


def test_many_runs_are_relabelled_at_random_with_a_seed() -> None:
    values = np.random.default_rng(0).normal(size=(24, 1)) + 0.4
    for sides in (None, np.repeat([1, -1], 12)):
        of = sample(values, [None] * 24, sides)
        assert p_values(of, seed=1)[0] == p_values(of, seed=1)[0]
        of_scipy = (
            scipy.stats.ttest_1samp(values, 0) if sides is None else scipy.stats.ttest_ind(values[:12], values[12:])
        )
        assert p_values(of)[0] == pytest.approx(of_scipy.pvalue[0], abs=0.02)
        assert least_p(of) == 1e-4


def test_rounding_and_missing_values_decide_nothing() -> None:
    values = np.stack([1e-17 * np.arange(6) + 1 - 1, np.ones(6), np.full(6, np.nan), np.arange(6) - 2.4], axis=1)
    of = sample(values, [None] * 6)
    found = estimate(of)
    assert (found.mean[:2] == [0, 1]).all()
    assert (found.error[:2] == 0).all()
    p = p_values(of)
    assert p[:2].tolist() == [1, 2 / 2**6]
    assert np.isnan(p[2])
    one = sample(np.ones((1, 1)), [None])
    assert np.isnan(estimate(one).interval(0.95)).all()
    assert (least_p(one), np.isnan(p_values(one)[0])) == (1, True)


def test_pseudo_values_are_the_runs_own_where_the_statistic_is_linear() -> None:
    values, weights = np.random.default_rng(0).random((5, 3)), np.full(5, 0.2)
    found = pseudo_values(values, weights, lambda mean: mean[..., :2])
    np.testing.assert_allclose(found, values[:, :2])
    # Of one that is not: n times the whole less (n - 1) times what is left without a run.
    square = pseudo_values(values, weights, lambda mean: mean[..., :1] ** 2)[:, 0]
    raw = [5 * values[:, 0].mean() ** 2 - 4 * np.delete(values[:, 0], i).mean() ** 2 for i in range(5)]
    np.testing.assert_allclose(square - square.mean(), raw - np.mean(raw))
    assert square.mean() == pytest.approx(values[:, 0].mean() ** 2)


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "seeds", "paired"), [(1, 10, True), (2, 3, True), (3, 3, False)])
def test_equal_methods_are_told_apart_in_one_of_twenty_at_most(tasks: int, seeds: int, paired: bool) -> None:
    """The simulation of docs/statistics.md, in small: six rows that hang together."""
    path = Path(__file__).parents[2] / "study" / "verdicts.py"
    spec = importlib.util.spec_from_file_location("verdicts", path)
    assert spec is not None
    assert spec.loader is not None
    verdicts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verdicts)
    found = verdicts.simulated("normal", tasks, seeds, paired, 400, np.random.default_rng(0))
    assert found["can_decide"]
    assert 0.005 < found["family"] <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert 0.93 <= found["coverage"] <= 0.985
