"""Cuts: what is left out of an adapter, direction by direction; what each leaves, and is predicted to cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from msplora_core.errors import TrainingError
from msplora_core.measure.updates import Update
from msplora_core.moments import Array, Moments, directions
from msplora_core.names import TOTAL


class Closed(NamedTuple):
    """The directions that a module loses: their places, from 0, in one of its bases.

    ``plain``: directions of the whole update, by its singular values; ``task``: by the task-weighted ones, which takes
    moments. ``scale_plain`` and ``scale_task``: those of each scale by itself, side by side in the order of the scales.
    """

    basis: str
    places: Sequence[int]


@dataclass(frozen=True)
class Cut:
    """What is left out of an adapter.

    Attributes:
        cut: Its kind: ``none``, ``module``, ``layer``, ``type``, ``scale``, ``only_scale``, ``rank``, ``rank_task``, or
            a word of your own.
        what: The module, layer, type or scale; ``adapter`` where it is about all of it.
        rank: What every module is cut to, if it is about ranks.
        closed: Module to the directions that it loses. A module that is not named stays whole.

    Example:
        >>> Cut("mine", "the last two", closed={"encoder.layer.0.query": Closed("plain", [6, 7])})
    """

    cut: str
    what: str = "adapter"
    rank: int | None = None
    closed: Mapping[str, Closed] = field(default_factory=dict)


def standard_cuts(updates: Mapping[str, Update], ranks: Sequence[int], *, task: bool) -> list[Cut]:
    """Nothing, each module, layer, type and scale left out, each scale alone, and every module cut to each rank.

    Args:
        updates: Of :func:`msplora_core.measure.updates.updates_of`.
        ranks: What every module is cut to.
        task: Whether to cut to ranks by the task-weighted spectrum too, which takes moments.
    """
    layers: dict[str, list[str]] = {}
    types: dict[str, list[str]] = {}
    for name in updates:
        if (layer := layer_of(name)) is not None:
            layers.setdefault(layer, []).append(name)
        type_ = next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)
        types.setdefault(type_, []).append(name)

    def without(names: Sequence[str]) -> dict[str, Closed]:
        return {name: Closed("plain", range(updates[name].rank)) for name in names}

    def without_scales(lost: Collection[str]) -> dict[str, Closed]:
        closed = {}
        for name, update in updates.items():
            places = [column for scale in update.scales if scale in lost for column in update.columns(scale)]
            if places:
                closed[name] = Closed("scale_plain" if len(update.parts) > 1 else "plain", places)
        return closed

    def to_rank(rank: int, basis: str) -> dict[str, Closed]:
        return {name: Closed(basis, range(rank, u.rank)) for name, u in updates.items() if u.rank > rank}

    scales = list(dict.fromkeys(scale for update in updates.values() for scale in update.scales))
    cuts = [Cut("none")]
    cuts += [Cut("module", name, closed=without([name])) for name in updates]
    cuts += [Cut("layer", layer, closed=without(names)) for layer, names in layers.items()]
    cuts += [Cut("type", type_, closed=without(names)) for type_, names in types.items()]
    cuts += [Cut("scale", scale, closed=without_scales([scale])) for scale in scales]
    if len(scales) > 1:
        cuts.append(Cut("scale", TOTAL, closed=without(list(updates))))
    cuts += [Cut("only_scale", scale, closed=without_scales({*scales} - {scale})) for scale in scales]
    cuts += [Cut("rank", rank=rank, closed=to_rank(rank, "plain")) for rank in ranks]
    if task:
        cuts += [Cut("rank_task", rank=rank, closed=to_rank(rank, "task")) for rank in ranks]
    return cuts


def layer_of(name: str) -> str | None:
    """The path of the numbered layer that a module stands in, such as ``encoder.layer.3``; None: in none."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdecimal()), None)


class Bases:
    """The directions of every update, each basis computed when it is first asked for.

    Args:
        updates: Of :func:`msplora_core.measure.updates.updates_of`.
        moments: Those of this adapter; without them the bases ``task`` and ``scale_task`` are missing.

    Raises:
        TrainingError: the moments are of another adapter.
    """

    def __init__(self, updates: Mapping[str, Update], moments: Moments | None) -> None:
        self.updates, self.moments = updates, moments
        self._found: dict[tuple[str, str], tuple[Array, Array]] = {}
        for name, update in updates.items():
            if moments is None:
                break
            of_module = moments.modules.get(name)
            norms = np.array([[_norm(part.a, 1.0), _norm(part.b, part.scaling)] for part in update.parts]).T
            found = of_module and (of_module.scales, of_module.ranks, of_module.fits(norms))
            if found != (update.scales, update.ranks, True):
                raise TrainingError(
                    f"the moments are of another adapter ({name} differs); record them anew for this one"
                )

    def of(self, name: str, basis: str) -> tuple[Array, Array]:
        """``left`` (R, R) and ``right`` (R, R) of a module: direction k of B A is (B left[:, k]) (right[k] A)."""
        if (name, basis) not in self._found:
            update = self.updates[name]
            if basis.endswith("plain"):
                s_a, s_b = (gram.numpy() for gram in update.grams())
            elif self.moments is not None:
                s_a, s_b = self.moments.modules[name].s_a, self.moments.modules[name].s_b
            else:
                raise TrainingError(f"{name}: the basis {basis} takes moments; record them, or give another basis")
            scales = update.scales if basis.startswith("scale_") else ()
            left, right = np.zeros_like(s_a), np.zeros_like(s_a)
            for part in [list(update.columns(scale)) for scale in scales] or [list(range(update.rank))]:
                block = np.ix_(part, part)
                _, left[block], right[block] = directions(s_a[block], s_b[block])
            self._found[name, basis] = left, right
        return self._found[name, basis]

    def core(self, name: str, closed: Closed) -> Array:
        """What is left of a module: M (R, R) of B M A, the sum of the directions that stay."""
        left, right = self.of(name, closed.basis)
        stay = np.delete(np.arange(len(left)), list(closed.places))
        return left[:, stay] @ right[stay]

    def predicted(self, cut: Cut) -> float:
        """The KL that a cut costs by its gates' scores, in nats an example; NaN without them."""
        if self.moments is None:
            return np.nan
        total: Array | float = 0.0
        for name, (basis, places) in cut.closed.items():
            scores = self.moments.modules[name].scores.get(basis)
            if scores is None:
                return np.nan
            total = total + scores[:, list(places)].sum(1, dtype=np.float64)
        return self.moments.predicted_kl(np.asarray(total))

    def parameters(self, cut: Cut) -> int:
        """What is left of the adapter's parameters.

        A module that keeps some of the directions of its whole update has factors of that rank of its own. Factors of a
        scale count once, however many modules use them, with as many directions as the one that keeps most.
        """
        own = 0
        shared: dict[tuple[int, int], int] = {}
        for name, update in self.updates.items():
            closed = cut.closed.get(name)
            lost = set(closed.places) if closed else set()
            whole = closed is not None and not closed.basis.startswith("scale_")
            if whole and 0 < len(lost) < update.rank:
                own += (update.rank - len(lost)) * update.sides
                continue
            for part in update.parts:
                kept = sum(place not in lost for place in update.columns(part.scale))
                pair = part.a.data_ptr(), part.b.data_ptr()
                shared[pair] = max(shared.get(pair, 0), kept * update.sides)
        return own + sum(shared.values())


def _norm(factor: torch.Tensor, scaling: float) -> float:
    return float(factor.double().square().sum()) * scaling**2
