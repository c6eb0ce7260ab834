"""The directions that the updates of an adapter are cut along: those of the weights, or those of the task.

Both are rank-1 terms of B A inside the factors' spaces, ordered by what they are worth. In Frobenius norm they are the
singular directions (Eckart & Young 1936); in the metric of the task those of ``msplora_core.moments.directions``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.adapters.moments import moments_file, open_moments
from msplora_analysis.compute.choose import Cut, below_kl
from msplora_analysis.compute.linalg.core_space import core_space
from msplora_analysis.compute.linalg.spectra import Array, adapter_spectra
from msplora_analysis.compute.weighted import Weights, fitting
from msplora_analysis.errors import AnalysisError
from msplora_analysis.options import NO_MOMENTS, Options, check_weights
from msplora_analysis.write.source import Module, Source
from msplora_core.moments import Moments, directions

RECORD = "record them with `msplora-measure moments`"


class Ranked(NamedTuple):
    """A module and its directions.

    Attributes:
        module: What is cut.
        sigma: (r,), the singular values of its update, descending.
        rank: How many of these are more than rounding.
        weights: The moments of its factors, if it has any.
        task_sigma: (r,), the task-weighted singular values, descending; empty without moments.
        scores: (rows, r), of the gates of the directions that it is cut along; None without.
    """

    module: Module
    sigma: Array
    rank: int
    weights: Weights | None
    task_sigma: Array
    scores: NDArray[np.floating] | None

    @property
    def cost(self) -> int:
        """Parameters of a direction."""
        return self.module.update.rows + self.module.update.cols


class Ranking(NamedTuple):
    """All modules of an adapter; ``by_task``: whether they are cut along directions of the task; ``draws``: rows of
    scores for an example; ``regression``: whether the task is one.
    """

    modules: list[Ranked]
    by_task: bool
    draws: int
    regression: bool

    def counted(self) -> list[Array]:
        """Of each module the singular values by which directions are chosen: all that are more than rounding."""
        if not self.by_task:
            return [one.sigma[: one.rank] for one in self.modules]
        return [one.task_sigma[: numerical_rank(one.task_sigma, len(one.task_sigma))] for one in self.modules]

    def scores(self) -> list[NDArray[np.floating]] | None:
        """Of each module those of its gates, if all have them."""
        known = [one.scores for one in self.modules if one.scores is not None]
        return known if len(known) == len(self.modules) else None


def ranked(source: Source, weights: str | None, options: Options) -> Ranking:
    """The directions of an open adapter.

    Args:
        source: What is cut.
        weights: "moments" or "none"; None: moments where they are.
        options: Where the moments are.

    Raises:
        AnalysisError: the moments are wanted and not there, or are those of another adapter.
    """
    if weights is not None:
        check_weights(weights)
    spectra = [one.sigma for one in adapter_spectra(source.file, [module.matrix for module in source.modules])]
    path = moments_file(source.adapter, options)
    if path is None and weights not in (None, NO_MOMENTS):
        raise AnalysisError(f"{source.adapter.file}: no moments beside it; {RECORD}, or give moments=", "moments")
    by_task = path is not None and weights != NO_MOMENTS
    basis = "task" if by_task else "plain"
    served, draws, regression = {}, 1, False
    if path is not None:
        moments = open_moments(path, source.file.states, scores=(basis,))
        matrices = [module.matrix for module in source.modules]
        served = fitting(source.file, path, moments.modules, source.matrices, matrices, [])
        draws, regression = moments.about.get("draws", 1), moments.is_regression
        _check_scores(path, basis, [(name, of.moments.scores.get(basis)) for name, of in served.items()])
    found = []
    for module, sigma in zip(source.modules, spectra, strict=True):
        rank = numerical_rank(sigma, max(module.update.rows, module.update.cols))
        known = served.get(module.matrix.name)
        if known is None:
            if by_task:
                message = f"{path}: no moments of {module.matrix.name}; record them anew, or give weights=none"
                raise AnalysisError(message, "weights")
            found.append(Ranked(module, sigma, rank, None, np.empty(0), None))
        else:
            task_sigma = directions(*known.weights).sigma
            found.append(Ranked(module, sigma, rank, known.weights, task_sigma, known.moments.scores.get(basis)))
    return Ranking(found, by_task, draws, regression)


def _check_scores(path: Path, basis: str, scores: Sequence[tuple[str, NDArray[np.floating] | None]]) -> None:
    rows = {len(of) for _, of in scores if of is not None}
    for name, of in scores:
        if of is not None and (len(rows) > 1 or not len(of) or not np.isfinite(of).all()):
            message = f"{path}: {name}/{basis}: expected finite scores of as many rows as other modules have"
            raise AnalysisError(f"{message}; record them anew", "moments")


def numerical_rank(sigma: Array, size: int) -> int:
    """How many singular values are more than rounding, as numpy's matrix_rank tells it."""
    return int((sigma > size * np.finfo(np.float64).eps * sigma[0]).sum())


class Kept(NamedTuple):
    """A cut update: ``b @ a``, and the errors in Frobenius norm and in the metric of the task, relative to the update.

    a: (k, cols). b: (rows, k). task_error: NaN without moments.
    """

    a: Array
    b: Array
    error: float
    task_error: float


def cut(one: Ranked, a: Array, b: Array, k: int, *, by_task: bool) -> Kept:
    """The first k directions of an update; all of it where k reaches its rank.

    Args:
        one: The module.
        a: (r, cols), and ``b``: (rows, r): its factors, float64.
        k: How many.
        by_task: Along the directions of the task.
    """
    task_error = np.nan if one.weights is None else _lost(one.task_sigma, k)
    if k >= one.rank:
        return Kept(*truncated(a, b, one.rank), _lost(one.sigma, one.rank), 0.0 * task_error)
    if by_task:
        assert one.weights is not None
        _, left, right = directions(*one.weights)
        new_a, new_b = right[:k] @ a, b @ left[:, :k]
        error = _norm_of_rest(left, right, k, Weights(a @ a.T, b.T @ b)) / float(np.linalg.norm(one.sigma))
        return Kept(*_balanced(new_a, new_b), error, task_error)
    if one.weights is not None:
        _, left, right = directions(a @ a.T, b.T @ b)
        whole = float(np.linalg.norm(one.task_sigma))
        task_error = _norm_of_rest(left, right, k, one.weights) / whole if whole else 0.0
    return Kept(*truncated(a, b, k), _lost(one.sigma, k), task_error)


def truncated(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """Factors of the best approximation of ``b @ a``; the square root of each singular value goes into either.

    Args:
        a: (r, cols).
        b: (rows, r).
        rank: At most r.

    Returns:
        (rank, cols) and (rows, rank).
    """
    space = core_space([(a, b)])
    return space.factors(space.cores[0], rank)


def _lost(sigma: Array, k: int) -> float:
    """The norm of all but the first k singular values, relative to that of all; 0 for an update of zero."""
    whole = float(np.linalg.norm(sigma))
    return float(np.linalg.norm(sigma[k:])) / whole if whole else 0.0


def _norm_of_rest(left: Array, right: Array, k: int, metric: Weights) -> float:
    """The norm of B (I - left_k right_k) A, in the metric of S_a and S_b: their Gram matrices, or their moments."""
    rest = np.eye(len(left)) - left[:, :k] @ right[:k]
    return float(np.sqrt(max(0.0, np.einsum("ij,ij->", rest, metric.s_b @ rest @ metric.s_a))))


def _balanced(a: Array, b: Array) -> tuple[Array, Array]:
    """The same terms, each with half of its size in either factor."""
    sizes_a, sizes_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0)
    known = (sizes_a > 0) & (sizes_b > 0)
    root = np.sqrt(np.divide(sizes_b, sizes_a, out=np.ones_like(sizes_a), where=known))
    return root[:, None] * a, b / root


def predicted_kl(ranking: Ranking, ranks: Sequence[int]) -> float | None:
    """What a cut is predicted to cost, in nats an example, on all examples of the moments; None without scores."""
    if (scores := ranking.scores()) is None:
        return None
    cuts = zip(ranking.modules, scores, ranks, strict=True)
    closed = [of[:, k:].sum(axis=1, dtype=np.float64) for one, of, k in cuts if k < one.rank]
    return Moments.predicted_kl(np.sum(closed, axis=0)) if closed else 0.0


def chosen_by_kl(ranking: Ranking, kl: float, source: Source, weight: float = 1.0) -> Cut:
    """The cut with the fewest parameters whose predicted KL is at most ``kl``, of an adapter at some weight.

    Raises:
        AnalysisError: it has no scores that tell.
    """
    scores = ranking.scores()
    if not scores:
        what = "moments without scores" if any(one.weights for one in ranking.modules) else "no moments"
        raise AnalysisError(f"{source.adapter.file}: kl={kl:g} needs scores, and it has {what}; {RECORD}", "kl")
    return below_kl([weight * of for of in scores], [one.cost for one in ranking.modules], kl, ranking.draws)
