"""Lower the rank of an adapter while it trains: the best update of a lower rank, from the factors, at stated steps.

LoRA-Squeeze (Vulić et al. 2026, arXiv 2602.10993, abstract) trains at a high rank and compresses to the rank that is
wanted, after training or gradually within it, by a randomised SVD of the whole update. Here the truncation is exact,
and no update is ever multiplied out: B A becomes (B left)(right A) with the small matrices of
:func:`msplora_core.moments.directions`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from msplora_core.measure.hooks import exact
from msplora_core.measure.recording import record_moments
from msplora_core.measure.updates import Update, updates_of
from msplora_core.methods.base import AnnealedMethod, Training
from msplora_core.moments import Array, directions
from msplora_core.tuners.msplora.layer import MSPLoraLinear

EXAMPLES = 512
"""How many examples of the last steps the task's moments are of, at least."""


@dataclass
class Pair:
    """The factors A (rank, in) and B (out, rank) that one module uses, or several.

    Attributes:
        scale: Whose they are; LoRA has ``layer`` alone.
        a: (rank, ...); what follows are the inputs.
        b: (out, rank, ...).
        places: The updates that they are a part of, and where among the columns of each.
    """

    scale: str
    a: nn.Parameter
    b: nn.Parameter
    places: list[tuple[Update, slice]] = field(default_factory=list)

    def grams(self) -> tuple[Array, Array]:
        """A Aᵀ and Bᵀ B, (rank, rank) float64 each."""
        a, b = exact(self.a.detach().flatten(1)), exact(self.b.detach().flatten(1))
        return (a @ a.T).cpu().numpy(), (b.T @ b).cpu().numpy()

    def set(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Put factors of another rank there; (rank, in) and (out, rank)."""
        for parameter, value in ((self.a, a), (self.b, b)):
            parameter.grad = None
            parameter.data = _shaped_as(parameter, value)


class Cut(NamedTuple):
    """A pair of a lower rank: A' = ``down`` A and B' = B ``up``.

    ``down``: (new rank, rank) and ``up``: (rank, new rank), float64. ``kept`` and ``whole``: sums of squared singular
    values, of what stays and of all.
    """

    down: Array
    up: Array
    kept: float
    whole: float


def best_cut(gram_a: Array, gram_b: Array, rank: int, moments: tuple[Array, Array] | None = None) -> Cut:
    """The best update of a lower rank, for a scale alpha / rank.

    The rows of A' all have the size that those of A have on average (root mean square), as a LoRA at its start has
    them; B' takes the singular values, and the change of the scale: alpha / rank rises, so B' falls.

    Args:
        gram_a: A Aᵀ.
        gram_b: Bᵀ B.
        rank: The new one.
        moments: S_a and S_b of the task; None: nearest in the Frobenius norm.

    Example:
        >>> import numpy as np
        >>> cut = best_cut(np.eye(2), np.diag([9.0, 4.0]), 1)  # B A = diag(3, 2)
        >>> print(cut.kept, cut.whole, abs(cut.up @ cut.down).round(9).tolist())  # at twice the scale
        9.0 13.0 [[0.5, 0.0], [0.0, 0.0]]
    """
    of = directions(*(moments or (gram_a, gram_b)))
    down, up = of.right[:rank], of.left[:, :rank]
    norms = ((down @ gram_a) * down).sum(1).clip(0) ** 0.5
    norms[norms == 0] = 1.0
    size = (gram_a.trace() / len(gram_a)) ** 0.5 / norms
    power = of.sigma**2
    kept, whole = float(power[:rank].sum()), float(power.sum())
    return Cut(size[:, None] * down, up / size * (rank / len(gram_a)), kept, whole)


def carry(optimizer: torch.optim.Optimizer, pair: Pair, cut: Cut) -> None:
    """Give Adam's averages the coordinates of the new factors.

    With ΔW = s B A and G its gradient, dL/dA = s BᵀG. So dL/dA' = s'/s upᵀ dL/dA, and averages of gradients go along.
    Of the squares only those of single entries are known: rows (columns of B) count as uncorrelated.

    Args:
        optimizer: Adam or AdamW.
        pair: Its factors before they are set to the new ones.
    """
    ratio = len(cut.up) / len(cut.down)  # of the scales, alpha / rank
    left, right = torch.from_numpy(ratio * cut.up.T), torch.from_numpy(ratio * cut.down.T)
    for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        for parameter in (pair.a, pair.b):
            if name in optimizer.state.get(parameter, {}):
                old = exact(optimizer.state[parameter][name].flatten(1))
                new = left.to(old) ** power @ old if parameter is pair.a else old @ right.to(old) ** power
                optimizer.state[parameter][name] = _shaped_as(parameter, new)


class Annealing(Training):
    """Lowers the ranks of an adapter after stated steps.

    Args:
        model: With an adapter of the first rank.
        method: What it was made by.
        cuts: After which steps the rank falls, and to what; of :meth:`AnnealedMethod.cuts`.
    """

    def __init__(self, model: nn.Module, method: AnnealedMethod, cuts: dict[int, int]) -> None:
        assert method.anneal is not None
        self.model, self.method, self.cuts = model, method, cuts
        self.rank = method.anneal[0]
        self.batches: deque[dict[str, torch.Tensor]] = deque()

    def sees(self, batch: dict[str, torch.Tensor]) -> None:
        if self.method.anneal_by == "task" and self.rank != self.method.rank:
            self.batches.append(batch)
            while sum(map(_rows, self.batches)) - _rows(self.batches[0]) >= EXAMPLES:
                self.batches.popleft()

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        if step not in self.cuts:
            return {}
        before, rank = self.rank, self.cuts[step]
        ranks = self.method.ranks_at(rank)
        moments = None
        if self.method.anneal_by == "task":
            moments = record_moments(self.model, self.batches).modules
        pairs = pairs_of(self.model)
        cuts = []
        for pair in pairs:
            weights = None
            if moments is not None:
                of = [(moments[update.name], part) for update, part in pair.places]
                weights = (
                    np.sum([m.s_a[part, part] for m, part in of], axis=0),
                    np.sum([m.s_b[part, part] for m, part in of], axis=0),
                )
            cut = best_cut(*pair.grams(), ranks[pair.scale], weights)
            if self.method.anneal_optimizer == "reset":
                optimizer.state.pop(pair.a, None)
                optimizer.state.pop(pair.b, None)
            else:
                carry(optimizer, pair, cut)
            a, b = exact(pair.a.detach().flatten(1)), exact(pair.b.detach().flatten(1))
            pair.set(torch.from_numpy(cut.down).to(a) @ a, b @ torch.from_numpy(cut.up).to(b))
            cuts.append(cut)
        self._tell(rank)
        whole = sum(cut.whole for cut in cuts)
        kept = sum(cut.kept for cut in cuts) / whole if whole else 1.0
        return {"anneal_from": before, "anneal_to": rank, "anneal_kept": kept}

    def state(self) -> dict[str, Any]:
        batches = [{name: value.cpu() for name, value in batch.items()} for batch in self.batches]
        return {"rank": self.rank, "batches": batches}

    def load(self, state: dict[str, Any]) -> None:
        self.batches.extend(state["batches"])
        if state["rank"] != self.rank:
            for pair in pairs_of(self.model):
                rank = self.method.ranks_at(state["rank"])[pair.scale]
                pair.set(pair.a.detach().flatten(1)[:rank], pair.b.detach().flatten(1)[:, :rank])
            self._tell(state["rank"])

    def _tell(self, rank: int) -> None:
        """Have everything that names the rank name the new one."""
        self.rank = rank
        if rank == self.method.rank:
            self.batches.clear()
        config: Any = self.model.peft_config["default"]
        if hasattr(config, "scale_ranks"):
            config.ranks = self.method.ranks_at(rank)
        else:
            config.r = rank
        for update in updates_of(self.model).values():
            layer, name = update.layer, update.adapter
            if isinstance(layer, MSPLoraLinear):
                layer.scaling[name] = config.scale_scalings()
            else:
                layer.r[name], layer.scaling[name] = rank, layer.lora_alpha[name] / rank
                if name in layer.lora_A:
                    layer.lora_A[name].out_features = layer.lora_B[name].in_features = rank


def pairs_of(model: nn.Module) -> list[Pair]:
    """The pairs of factors of a model's active adapter, each once."""
    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    pairs: dict[int, Pair] = {}
    for update in updates_of(model).values():
        for part in update.parts:
            a, b = parameters[part.a.data_ptr()], parameters[part.b.data_ptr()]
            columns = update.columns(part.scale)
            pair = pairs.setdefault(id(a), Pair(part.scale, a, b))
            pair.places.append((update, slice(columns.start, columns.stop)))
    return list(pairs.values())


def _shaped_as(parameter: nn.Parameter, values: torch.Tensor) -> torch.Tensor:
    """A factor's (rows, columns) as its parameter has them; a convolution's have four dimensions."""
    return values.to(parameter).reshape(len(values), -1, *parameter.shape[2:]).contiguous()


def _rows(batch: dict[str, torch.Tensor]) -> int:
    return len(next(iter(batch.values())))
