"""Two methods compared: do the layers of one differ more, by how much, and is it beyond chance?

    from msplora_analysis.ask.comparison.compare import Side, compare, sentences

    table = compare(Side("MSPLoRA", spectra_a, pairs_a), Side("LoRA", spectra_b, pairs_b))
    print(*sentences(table), sep="\\n")

Measures, each a mean over all pairs of layers or over neighbours, of the ``layer`` parts:
- ``kl``: D_KL(i‖j) of the normalised spectra in nats: Figure 4 of arXiv 2503.21838 as it is.
- ``kl_matched``: the same with both methods cut to the same number of values and normalised again, since a
  distribution over two values has less room to differ than one over eight.
- ``overlap_in``, ``overlap_out``: subspace overlap of the input and output directions, less what chance gives.

Averaging: ``spectra`` first, over modules and runs, then the divergence (the paper's order); or ``divergences`` of each
run and module first, then their mean. For overlaps both are the same.

Intervals are bootstrap intervals over runs. Seeds are drawn anew within each task, so that an interval is about these
tasks; or whole tasks are drawn, if it shall be about tasks like them (three tasks are few for that). Runs that pair up
by task and seed are drawn together. Few runs make intervals too narrow: of normal data, those of 95 % hold 84 % with 5
and 72 % with 3, simulated.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from msplora_analysis.ask.comparison.pairing import Unit, drawn, pair, units
from msplora_analysis.ask.comparison.uncertainty import RESAMPLES, adjacent_test, interval, neighbours
from msplora_analysis.compute.measures.divergence import Array, kl_matrices
from msplora_analysis.errors import AnalysisError
from msplora_analysis.tables.checkpoints import at_epoch
from msplora_analysis.tables.matrices import choose, ks, prepare, stacks_of

AVERAGING = ("spectra", "divergences")
RESAMPLED = ("seeds", "tasks")
LEVEL = 0.05  # below which a p-value decides
ENOUGH = 3  # runs of either method: an interval of fewer decides nothing
COLUMNS = {
    "question": "str", "measure": "str", "pairs": "str", "a": "str", "b": "str", "value_a": "float64",
    "value_b": "float64", "estimate": "float64", "low": "float64", "high": "float64", "confidence": "float64",
    "p_value": "float64", "decided": "bool", "n_a": "Int64", "n_b": "Int64", "tasks": "Int64", "paired": "bool",
    "resampled": "str", "averaging": "str", "epoch": "Float64", "k_a": "Int64", "k_b": "Int64",
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """The runs of one method: their spectra table; their pairs table (``redundancy``) and units, if known."""

    label: str
    spectra: pd.DataFrame
    pairs: pd.DataFrame | None = None
    units: Sequence[Unit] | None = None


class Layers(NamedTuple):
    """What is compared of a method. spectra: (runs, modules, L, r). overlaps: measure -> (runs, L, L)."""

    label: str
    layers: tuple[int, ...]
    units: list[Unit]
    spectra: Array
    overlaps: dict[str, Array]

    def matrices(self, measure: str, averaging: str, rank: int) -> tuple[Array, bool]:
        """What is averaged over runs: spectra (runs, L, k), which True says, or matrices (runs, L, L)."""
        if measure in self.overlaps:
            return self.overlaps[measure], False
        spectra = self.spectra[..., :rank]
        if averaging == "spectra":
            return _mean_known(spectra), True
        return _mean_known(kl_matrices(spectra)), False


def compare(
    a: Side,
    b: Side,
    *,
    averaging: str = "spectra",
    resample: str = "seeds",
    epoch: float | None = None,
    stack: str | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Rows of the question ``difference``, one per measure and kind of pairs; then of ``adjacent-distant`` (do
    neighbours differ from layers further apart?), one per measure and method.

    Columns: question, measure, pairs, a, b (labels; b empty for one method), value_a, value_b (means under a and b; or
    over neighbours and over other pairs), estimate = value_a - value_b, low, high, confidence (of the interval; empty
    where the runs are too few), p_value (permutation test), decided, n_a, n_b (runs), tasks, paired, resampled,
    averaging, epoch, k_a, k_b (singular values compared).

    epoch: the last that all runs share unless given. stack: of numbered layers, if there are several. resamples: of the
    bootstrap and the permutations. Raises AnalysisError if the two cannot be compared.
    """
    for name, given, known in (("averaging", averaging, AVERAGING), ("resample", resample, RESAMPLED)):
        if given not in known:
            raise AnalysisError(f"{name} must be one of {', '.join(known)}, not {given!r}")
    if not 0 < confidence < 1:
        raise AnalysisError(f"confidence must be between 0 and 1, not {confidence:g}")
    ours, theirs, when = _layers(a, b, epoch, stack)
    both = pair(ours.units, theirs.units)
    if both:
        ours, theirs = (_chosen(side, [units[i] for units in both]) for i, side in enumerate((ours, theirs)))
    strata, what = drawn(ours.units, theirs.units, paired=bool(both), tasks=resample == "tasks")
    tasks = len({unit.task for unit in (*ours.units, *theirs.units)})
    about = {"tasks": tasks, "averaging": averaging, "epoch": when}
    enough = min(len(ours.units), len(theirs.units)) >= ENOUGH
    rows: list[dict[str, Any]] = []
    tests: list[dict[str, Any]] = []
    for measure in ("kl", "kl_matched", *sorted(ours.overlaps.keys() & theirs.overlaps.keys())):
        ranks = [side.spectra.shape[-1] for side in (ours, theirs)]
        k_a, k_b = ranks if measure == "kl" else [min(ranks)] * 2
        about["measure"] = measure
        means = [_Means(*side.matrices(measure, averaging, k)) for side, k in ((ours, k_a), (theirs, k_b))]
        size = max(mean.values.size for mean in means) * len(ours.layers)
        for pairs, where in (("all", 1 - np.eye(len(ours.layers))), ("adjacent", neighbours(len(ours.layers)))):
            difference = _Difference(means[0], means[1], where)
            a_mean, b_mean = difference.sides(np.ones((1, len(ours.units) + len(theirs.units))))
            low, high = interval(difference, strata, confidence=confidence, resamples=resamples, seed=seed, size=size)
            rows.append(
                about
                | {"question": "difference", "pairs": pairs, "a": a.label, "b": b.label}
                | {"value_a": a_mean[0], "value_b": b_mean[0], "estimate": a_mean[0] - b_mean[0]}
                | {"low": low, "high": high, "confidence": confidence, "decided": enough and bool(low > 0 or high < 0)}
                | {"n_a": len(ours.units), "n_b": len(theirs.units), "k_a": k_a, "k_b": k_b}
                | {"paired": bool(both), "resampled": what}
            )
        for side, mean, k in ((ours, means[0], k_a), (theirs, means[1], k_b)):
            if measure == "kl_matched" and k == side.spectra.shape[-1]:
                continue  # what kl says
            matrix = mean.matrices(np.ones((1, len(side.units))))[0]
            near, far, p = adjacent_test(matrix, resamples=resamples, seed=seed)
            tests.append(
                about
                | {"question": "adjacent-distant", "pairs": "adjacent", "a": side.label, "b": None}
                | {"value_a": near, "value_b": far, "estimate": near - far, "p_value": p, "decided": bool(p < LEVEL)}
                | {"n_a": len(side.units), "n_b": None, "k_a": k, "k_b": None, "paired": False, "resampled": "layers"}
            )
    return pd.DataFrame([*rows, *tests], columns=list(COLUMNS)).astype(COLUMNS)


def _mean_known(values: Array, axis: int | tuple[int, int] = 1) -> Array:
    """Mean of what is there over the modules (axis 1), or other axes; NaN where nothing is, as of updates of zero."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(known, values, 0).sum(axis=axis) / known.sum(axis=axis)
    return mean


class _Means(NamedTuple):
    """Weighted means over runs of ``values``: matrices (runs, L, L), or spectra (runs, L, k), compared after that."""

    values: Array
    are_spectra: bool

    def matrices(self, weights: Array) -> Array:
        """(..., L, L) for weights (..., runs)."""
        share = weights / weights.sum(axis=-1, keepdims=True)
        flat = share @ self.values.reshape(len(self.values), -1)
        mean: Array = flat.reshape(*share.shape[:-1], *self.values.shape[1:])
        return kl_matrices(mean) if self.are_spectra else mean


@dataclass(frozen=True)
class _Difference:
    """Of two methods, the difference of means over the pairs of layers ``where`` (L, L)."""

    ours: _Means
    theirs: _Means
    where: Array

    def __call__(self, weights: Array) -> Array:
        first, second = self.sides(weights)
        return first - second

    def sides(self, weights: Array) -> list[Array]:
        """Both means (...), for weights (..., runs of both)."""
        parts = np.split(weights, [len(self.ours.values)], axis=-1)
        both = [method.matrices(part) for method, part in zip((self.ours, self.theirs), parts, strict=True)]
        return [_mean_known(np.where(self.where > 0, matrices, np.nan), (-2, -1)) for matrices in both]


def _layers(a: Side, b: Side, epoch: float | None, stack: str | None) -> tuple[Layers, Layers, float]:
    """Both at one epoch, and that epoch (NaN if it is not one)."""
    if a.label == b.label:
        raise AnalysisError(f"both methods are called {a.label}: give each a label of its own")
    parts: list[pd.DataFrame] = []
    for side in (a, b):
        matrices = prepare(side.spectra)
        if (several := matrices["variant"].unique().tolist())[1:]:
            raise AnalysisError(f"{side.label}: holds several methods ({', '.join(several)}); choose one of them")
        layers = matrices[(matrices["scale"] == "layer") & matrices["stack"].notna()]
        parts.append(layers.assign(variant=side.label))
    shared = [stack for stack in parts[0]["stack"].unique() if stack in set(parts[1]["stack"])]
    stack = choose("stack", stack, shared)
    both = at_epoch(pd.concat([part[part["stack"] == stack] for part in parts], ignore_index=True), epoch)
    epochs = both["epoch"].unique()
    when = float(epochs[0]) if len(epochs) == 1 else float("nan")
    sides = [_of_side(side, both[both["variant"] == side.label], stack, when) for side in (a, b)]
    if sides[0].layers != sides[1].layers or len(sides[0].layers) < 2:
        raise AnalysisError(f"{a.label} and {b.label} do not adapt the same two or more layers of {stack}")
    return sides[0], sides[1], when


def _of_side(side: Side, matrices: pd.DataFrame, stack: str, when: float) -> Layers:
    """Spectra by run, module and layer; a module that a layer has several times counts once, by its mean."""
    layers = tuple(sorted(matrices["group"].unique().tolist()))
    runs = list(dict.fromkeys(matrices["run"]))
    rank = int(matrices.groupby("group")["rank"].max().min())
    columns = ks(matrices)[:rank]
    modules = list(dict.fromkeys(matrices["module"]))
    cells = matrices.groupby(["run", "module", "group"])[columns].mean()
    index = [(run, module, layer) for run in runs for module in modules for layer in layers]
    spectra = cells.reindex(index).to_numpy(dtype=np.float64).reshape(len(runs), len(modules), len(layers), rank)
    known = list(side.units) if side.units is not None else units(runs)
    by_run = {unit.run: unit for unit in known}
    overlaps = {} if side.pairs is None else _overlaps(side, runs, layers, stack, when)
    return Layers(side.label, layers, [by_run.get(run, Unit(run)) for run in runs], spectra, overlaps)


def _overlaps(side: Side, runs: list[str], layers: tuple[int, ...], stack: str, when: float) -> dict[str, Array]:
    """Overlap less chance of every pair of layers, mean over modules: (runs, L, L), NaN on the diagonal."""
    assert side.pairs is not None
    pairs = side.pairs[(side.pairs["scale"] == "layer") & side.pairs["run"].isin(runs)]
    if "name_i" in pairs:
        pairs = pairs[stacks_of(pairs["name_i"]) == stack]
    if pairs.groupby("run")[["step", "epoch"]].apply(lambda of: len(of.drop_duplicates())).gt(1).any():
        pairs = pairs[pairs["epoch"].astype("Float64") == when]
    if missing := sorted(set(runs) - set(pairs["run"])):
        raise AnalysisError(
            f"{side.label}: the pairs table lacks {missing[0]} at epoch {when:g}; make it of the same runs"
        )
    place = {layer: i for i, layer in enumerate(layers)}
    found = {}
    for name in ("overlap_in", "overlap_out"):
        # Chance on that side, where the table has its details: inputs and outputs may differ in width.
        chance = name.replace("overlap", "expected")
        rows = pairs.assign(value=pairs[name] - pairs[chance if chance in pairs else "overlap_expected"])
        means = rows.groupby(["run", "group_i", "group_j"])["value"].mean()
        values = np.full((len(runs), len(layers), len(layers)), np.nan)
        for (run, i, j), value in zip(means.index, means, strict=True):
            if i in place and j in place:
                x, y, z = runs.index(run), place[i], place[j]
                values[x, y, z] = values[x, z, y] = value
        found[name] = values
    return found


def _chosen(side: Layers, chosen: list[Unit]) -> Layers:
    """The runs chosen, in that order; says which are left out."""
    if left := [unit.run for unit in side.units if unit not in chosen]:
        warnings.warn(
            f"{side.label}: {', '.join(left[:3])} ({len(left)} in all) left out, without a partner", stacklevel=3
        )
    index = [side.units.index(unit) for unit in chosen]
    overlaps = {name: values[index] for name, values in side.overlaps.items()}
    return side._replace(units=chosen, spectra=side.spectra[index], overlaps=overlaps)
