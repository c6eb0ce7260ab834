"""Which singular values to keep of many modules when all may take a given number of parameters.

A direction of a module costs rows + cols parameters and saves sigma² of the squared error. Within a
module the gains descend, so that any choice by gain is a choice of leading directions; modules of
one cost are as one with all their gains. What is left is how many directions n_c to take at each
cost c: to minimise, by Lagrange's λ (the gain per parameter at which a greedy choice has spent the
budget),

    sum over c of loss_c(n_c) + λ (budget - spent),

where loss_c(n), the sum of |gain - λ c| over the directions between n and λ's own choice, is convex
with minimum 0. Any allocation within the budget gives a bound, which leaves few n_c per cost;
these are tried all (Martello & Toth 1990, Knapsack Problems, section 2.4: reduction by bounds).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.linalg.spectra import Array

Counts = NDArray[np.int64]


def allocate(gains: Sequence[Array], costs: Sequence[int], budget: int) -> list[int]:
    """How many leading gains to take of each module, of the largest sum within the budget.

    The result is optimal, but for the rounding of float64 sums; gains of zero are not taken.

    Args:
        gains: Of each module, (r_i,), descending and not negative (sigma²).
        costs: What each of a module's gains costs, positive.
        budget: What all may cost.

    Returns:
        A number for each module.
    """
    kinds = sorted(set(costs))
    pools = [np.concatenate([g for g, c in zip(gains, costs, strict=True) if c == kind]) for kind in kinds]
    pools = [np.sort(pool[pool > 0])[::-1] for pool in pools]
    counts = _best_counts(pools, kinds, budget)
    ranks = np.zeros(len(gains), dtype=np.int64)
    for kind, count in zip(kinds, counts, strict=True):
        modules = [i for i, cost in enumerate(costs) if cost == kind]
        owners = np.repeat(modules, [len(gains[i]) for i in modules])
        merged = np.concatenate([gains[i] for i in modules])
        taken = owners[np.argsort(-merged, kind="stable")[:count]]
        np.add.at(ranks, taken, 1)
    return ranks.tolist()


def _best_counts(pools: list[Array], costs: list[int], budget: int) -> Counts:
    """How many to take of each pool."""
    everything = np.array([len(pool) for pool in pools], dtype=np.int64)
    if everything @ np.array(costs, dtype=np.int64) <= budget:
        return everything
    kinds = np.repeat(np.arange(len(pools)), everything)
    density = np.concatenate([pool / cost for pool, cost in zip(pools, costs, strict=True)])
    order = np.argsort(-density, kind="stable")
    kinds, density = kinds[order], density[order]
    spent = np.cumsum(np.array(costs, dtype=np.int64)[kinds])
    first_out = int(np.searchsorted(spent, budget, side="right"))
    greedy = np.bincount(kinds[:first_out], minlength=len(pools)).astype(np.int64)
    price = float(density[first_out])
    free = budget - int(greedy @ np.array(costs, dtype=np.int64))
    losses = [_losses(pool - price * cost, count) for pool, cost, count in zip(pools, costs, greedy, strict=True)]

    best, bound = greedy, price * free
    for most in (2, 8, None):  # a better allocation near the greedy one leaves less to try
        windows = [_window(loss, count, bound, most) for loss, count in zip(losses, greedy, strict=True)]
        found, value = _search(losses, costs, windows, greedy, free, price, bound)
        if found is not None and value < bound:
            best, bound = found, value
    return best


def _losses(reduced: Array, count: int) -> Array:
    """Of taking n = 0, 1, ... of a pool with reduced gains (descending), where ``count`` is best."""
    sums = np.concatenate([[0.0], np.cumsum(reduced[count:])])
    before = np.concatenate([[0.0], np.cumsum(reduced[:count][::-1])])[::-1]
    return np.concatenate([before[:-1], -sums])


def _window(loss: Array, count: int, bound: float, most: int | None) -> Counts:
    """The n worth trying: those that lose no more than the bound."""
    tried = np.flatnonzero(loss <= bound)
    return tried if most is None else tried[abs(tried - count) <= most]


def _search(
    losses: list[Array],
    costs: list[int],
    windows: list[Counts],
    greedy: Counts,
    free: int,
    price: float,
    bound: float,
) -> tuple[Counts | None, float]:
    """The allocation of least loss among all of the windows, and its loss; None if none is within the bound."""
    extra, lost = np.zeros(1, dtype=np.int64), np.zeros(1)  # spent beyond the greedy choice; loss so far
    trail = []
    least = [int((window[0] - count) * cost) for window, count, cost in zip(windows, greedy, costs, strict=True)]
    for i, (loss, window, cost) in enumerate(zip(losses, windows, costs, strict=True)):
        spending = (window - greedy[i]) * cost
        all_extra = (extra[:, None] + spending).ravel()
        all_lost = (lost[:, None] + loss[window]).ravel()
        possible = np.flatnonzero((all_lost <= bound) & (all_extra + sum(least[i + 1 :]) <= free))
        # Of states that spend as much or more, only those are kept that gain more.
        order = possible[np.lexsort((all_lost[possible], all_extra[possible]))]
        value = price * all_extra[order] - all_lost[order]
        ahead = np.concatenate([[-np.inf], np.maximum.accumulate(value)[:-1]])
        kept = order[value > ahead]
        if not len(kept):
            return None, bound
        extra, lost = all_extra[kept], all_lost[kept]
        trail.append((kept // len(window), window[kept % len(window)]))
    totals = lost + price * (free - extra)
    state = int(np.argmin(totals))
    value = float(totals[state])
    counts = np.zeros(len(costs), dtype=np.int64)
    for i in reversed(range(len(costs))):
        parents, taken = trail[i]
        counts[i] = taken[state]
        state = int(parents[state])
    return counts, value
