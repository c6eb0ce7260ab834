"""How many directions of each module to keep: by rank, by energy, within a budget of parameters, or below a KL.

Directions of a module are kept in order, so that a cut is one number for each module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.linalg.spectra import Array
from msplora_analysis.compute.measures.rank_needed import energy_rank
from msplora_analysis.errors import AnalysisError
from msplora_core.moments import Moments


class Choice(NamedTuple):
    """What is said of how much to keep: one of these.

    energy: of every module, this share of the sum of its squared singular values, in (0, 1]. rank: of every module.
    budget: parameters in all. kl: nats an example, predicted by the scores of the gates.
    """

    energy: float | None = None
    rank: int | None = None
    budget: int | None = None
    kl: float | None = None

    def check(self) -> None:
        """Raises AnalysisError unless one is given, and is in range."""
        if sum(choice is not None for choice in self) != 1:
            raise AnalysisError("give one of energy=, rank=, budget= and kl=", *self._fields)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise AnalysisError(
                f"energy={self.energy:g}: expected a share of the sum of sigma², above 0 and at most 1", "energy"
            )
        for name in ("rank", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AnalysisError(f"{name}={value}: expected a whole number of at least 1", name)
        if self.kl is not None and not 0 < self.kl < np.inf:
            raise AnalysisError(f"kl={self.kl:g}: expected nats an example, above 0, such as 0.01", "kl")

    def ranks(self, spectra: Sequence[Array], full: Sequence[int], costs: Sequence[int]) -> list[int]:
        """Directions to keep of each module, but for ``kl``.

        Args:
            spectra: Of each module the singular values that count, (r_i,), descending; none that are but rounding.
            full: The rank of each update: with as many directions it is kept as it is.
            costs: What a direction of each module costs, in parameters.
        """
        if self.energy is not None:
            return [int(energy_rank(sigma, self.energy)) if len(sigma) else 0 for sigma in spectra]
        if self.rank is not None:
            both = zip(spectra, full, strict=True)
            return [rank if self.rank >= rank else min(self.rank, len(sigma)) for sigma, rank in both]
        assert self.budget is not None
        return allocate([sigma**2 for sigma in spectra], costs, self.budget)


def allocate(gains: Sequence[Array], costs: Sequence[int], budget: int) -> list[int]:
    """How many directions to keep of each module: by descending gain per parameter, passing over what does not fit.

    Their sum of gains is within one gain, that of the first direction passed over, of the largest possible (Dantzig's
    bound of the knapsack), and is the largest where all costs are equal.

    Args:
        gains: Of each module, (r_i,), descending.
        costs: What each direction of a module costs.
        budget: What all may cost.
    """
    ranks = [0] * len(gains)
    directions = ((-gain / costs[i], i) for i, of_module in enumerate(gains) for gain in of_module)
    for _, module in sorted(directions):
        if costs[module] <= budget:
            budget -= costs[module]
            ranks[module] += 1
    return ranks


class Cut(NamedTuple):
    """Directions kept of each module, and what that costs, in nats an example.

    predicted: on the examples that the choice did not see. on_chosen: on those that it saw.
    """

    ranks: list[int]
    predicted: float
    on_chosen: float


def below_kl(scores: Sequence[NDArray[np.floating]], costs: Sequence[int], nats: float, draws: int = 1) -> Cut:
    """The cut with the fewest parameters, found greedily, whose predicted KL is at most ``nats``.

    Gates close one after another, in every module from the last direction on: always the one that raises the predicted
    KL ½ mean (sum of closed gates' scores)² least for each parameter that it saves, so that interactions of directions
    and modules count. Every second example decides. A choice among thousands of noisy numbers finds what is low by
    chance, so an interaction counts only as far as it exceeds its standard error, and the path ends where the
    prediction on the other examples, which nothing is chosen by, or on these exceeds ``nats``.

    Args:
        scores: Of each module (examples × draws, r_i), directions in order: see ``msplora_core.moments``.
        costs: What a direction of each module costs, in parameters.
        nats: The most that the cut may cost.
        draws: Rows of an example.

    Raises:
        AnalysisError: there are fewer than two examples.
    """
    chosen = np.arange(len(scores[0])) // draws % 2 == 0
    if chosen.all():
        raise AnalysisError("the moments are of one example; kl= needs two or more: record them anew", "kl")
    seen, unseen = ([of[rows].T.astype(np.float64, order="C") for of in scores] for rows in (chosen, ~chosen))
    ranks = np.array([len(of) for of in seen])
    price = np.array(costs, dtype=np.float64)
    following = np.stack([of[-1] for of in seen])  # the gate of each module that would close next
    squares = following**2
    closed, closed_unseen = np.zeros(following.shape[1]), np.zeros(unseen[0].shape[1])
    best = Cut(ranks.tolist(), 0.0, 0.0)
    while ranks.any():
        together = 2 * following @ closed
        sure = np.maximum(0, np.abs(together) - 2 * np.sqrt(squares @ closed**2))
        increase = np.copysign(sure, together) + squares.sum(axis=1)
        i = int(np.argmin(np.where(ranks > 0, increase / price, np.inf)))
        ranks[i] -= 1
        closed += seen[i][ranks[i]]
        closed_unseen += unseen[i][ranks[i]]
        cost, cost_unseen = (Moments.predicted_kl(of) for of in (closed, closed_unseen))
        if max(cost, cost_unseen) > nats:
            break
        best = Cut(ranks.tolist(), cost_unseen, cost)
        if ranks[i]:
            following[i] = seen[i][ranks[i] - 1]
            squares[i] = following[i] ** 2
    return best
