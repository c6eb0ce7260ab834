"""Two methods compared: do the layers of one differ more, by how much, and is it beyond chance?

    from msplora_analysis.ask.comparison.compare import Side, compare
    from msplora_analysis.ask.comparison.statements import sentences, verdict

    table = compare(Side("MSPLoRA", spectra_a, pairs_a), Side("LoRA", spectra_b, pairs_b))
    print(verdict(table), *sentences(table), sep="\\n")

Measures, each a mean over all pairs of layers or over neighbours, of the ``layer`` parts:
- ``kl``: D_KL(i‖j) of the normalised spectra in nats: Figure 4 of arXiv 2503.21838 as it is.
- ``kl_matched``: the same with both methods cut to the same number of values and normalised again, since a
  distribution over two values has less room to differ than one over eight.
- ``js``: Jensen–Shannon divergence of spectra cut like that, which no small value can dominate.
- ``overlap_in``, ``overlap_out``: subspace overlap of the input and output directions, less what chance gives.

Averaging: ``spectra`` first, over modules and runs, then the divergence (the paper's order); or ``divergences`` of each
run and module first, then their mean. For overlaps both are the same.

``uncertainty`` has the statistics: intervals, and decisions that hold for all rows of the table at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from msplora_analysis.ask.comparison.pairing import Unit, pair, units
from msplora_analysis.ask.comparison.uncertainty import (
    LEVEL,
    Sample,
    adjacent_test,
    estimate,
    least_p,
    neighbours,
    p_values,
    pseudo_values,
    sample,
)
from msplora_analysis.compute.measures.divergence import Array, js_matrices, kl_matrices
from msplora_analysis.errors import AnalysisError
from msplora_analysis.tables.checkpoints import at_epoch
from msplora_analysis.tables.matrices import choose, ks, prepare, stacks_of

AVERAGING = ("spectra", "divergences")
CLAIMS = ("runs", "tasks")
FEWEST_TASKS = 6  # of which the signs can decide anything: 2 / 2^6 is below 5 %
DIFFERENCES = 0.8  # their share of the 5 %; the questions about neighbours have the rest
_MATRICES = {"kl": kl_matrices, "kl_matched": kl_matrices, "js": js_matrices}
COLUMNS = {
    "question": "str", "measure": "str", "pairs": "str", "a": "str", "b": "str", "value_a": "float64",
    "value_b": "float64", "estimate": "float64", "low": "float64", "high": "float64", "confidence": "float64",
    "p_value": "float64", "decided": "bool", "least_p": "float64", "same_layer": "float64", "margin": "float64",
    "equivalent": "bool", "n_a": "Int64", "n_b": "Int64", "tasks": "Int64", "paired": "bool", "resampled": "str",
    "claim": "str", "averaging": "str", "epoch": "Float64", "k_a": "Int64", "k_b": "Int64",
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """The runs of one method: their spectra table; their pairs table (``redundancy``) and units, if known.

    same_layer: measure -> its mean for one layer in two runs of one task, where that is known.
    """

    label: str
    spectra: pd.DataFrame
    pairs: pd.DataFrame | None = None
    units: Sequence[Unit] | None = None
    same_layer: Mapping[str, float] = field(default_factory=dict)


class Layers(NamedTuple):
    """What is compared of a method. spectra: (runs, modules, L, r). overlaps: measure -> (runs, L, L).

    directions: how many an overlap compares, (chance, K): K is None in a table that does not say it.
    """

    label: str
    layers: tuple[int, ...]
    units: list[Unit]
    spectra: Array
    overlaps: dict[str, Array]
    directions: tuple[float, int | None]
    same_layer: Mapping[str, float]

    @property
    def rank(self) -> int:
        return int(self.spectra.shape[-1])

    @property
    def tasks(self) -> list[str | None]:
        return [unit.task for unit in self.units]


class _Measured(NamedTuple):
    """One measure of one method. values: (runs, 2) over all pairs and over neighbours. mean: (2,). layers: (L, L)."""

    values: Array
    mean: Array
    layers: Array


def compare(
    a: Side,
    b: Side,
    *,
    averaging: str = "spectra",
    claim: str = "runs",
    margin: float | Mapping[str, float] | None = None,
    epoch: float | None = None,
    stack: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Rows of the question ``difference``, one per measure and kind of pairs; then of ``adjacent-distant`` (do
    neighbours differ from layers further apart?), one per measure and method.

    Args:
        averaging: "spectra" or "divergences", as above.
        claim: "runs": what is said holds of these tasks. "tasks": of tasks like them, from one value a task.
        margin: Up to this difference the methods count as equal: of every measure, or by name.
        epoch: The last that all runs share unless given.
        stack: Of numbered layers, if there are several.
        confidence: Of the intervals.
        seed: Of random relabelling, where not all ways can be tried.

    Returns:
        Columns question, measure, pairs, a, b (labels; b empty for one method), value_a, value_b (means under a and b;
        or over neighbours and over other pairs), estimate = value_a - value_b, low, high, confidence (of the interval;
        empty where the runs are too few), p_value (corrected for all rows; empty where the numbers of values differ),
        decided (p_value at most 0.05), least_p (the least that so many runs can reach), same_layer (value of the
        measure for one layer in two runs of a task, to weigh the estimate by), margin, equivalent (by two one-sided
        tests, corrected for all rows), n_a, n_b (runs), tasks, paired, resampled, claim, averaging, epoch, k_a, k_b
        (singular values or directions compared).

    Raises:
        AnalysisError: The two cannot be compared.
    """
    for name, given, known in (("averaging", averaging, AVERAGING), ("claim", claim, CLAIMS)):
        if given not in known:
            raise AnalysisError(f"{name} must be one of {', '.join(known)}, not {given!r}")
    if not 0 < confidence < 1:
        raise AnalysisError(f"confidence must be between 0 and 1, not {confidence:g}")
    ours, theirs, when = _layers(a, b, epoch, stack)
    ours, theirs, paired = _matched(ours, theirs)
    tasks = len({*ours.tasks, *theirs.tasks})
    if claim == "tasks" and (None in ours.tasks or tasks < FEWEST_TASKS):
        raise AnalysisError(
            f"claim='tasks' (--claim tasks) needs runs of {FEWEST_TASKS} tasks or more, whose names run.json or the "
            f"paths tell; these are of {0 if None in ours.tasks else tasks}"
        )
    measures = ["kl", "kl_matched", "js", *sorted(ours.overlaps.keys() & theirs.overlaps.keys())]
    k = {measure: _compared(ours, theirs, measure) for measure in measures}
    of_each = {
        measure: [_measured(side, measure, averaging, k[measure][i]) for i, side in enumerate((ours, theirs))]
        for measure in measures
    }
    drawn, tested = _sample(ours, theirs, list(of_each.values()), paired, claim)
    comparable = np.repeat([_comparable(ours, theirs, measure, *k[measure]) for measure in measures], 2)
    about: dict[str, Any] = {"tasks": tasks, "averaging": averaging, "epoch": when, "claim": claim}
    table = pd.DataFrame(
        [
            {"question": "difference", "measure": measure, "pairs": pairs, "a": a.label, "b": b.label}
            | {"value_a": one.mean[i], "value_b": other.mean[i], "estimate": one.mean[i] - other.mean[i]}
            | {"n_a": len(ours.units), "n_b": len(theirs.units), "k_a": k[measure][0], "k_b": k[measure][1]}
            | {"same_layer": _same_layer(ours, theirs, measure, averaging, k[measure]), "paired": paired}
            | {"resampled": tested}
            for measure, (one, other) in of_each.items()
            for i, pairs in enumerate(("all", "adjacent"))
        ]
    ).assign(**about)
    found = estimate(drawn)
    table["low"], table["high"] = (end - found.mean + table["estimate"] for end in found.interval(confidence))
    p = np.full(len(table), np.nan)
    p[comparable] = p_values(drawn._replace(values=drawn.values[:, comparable]), seed=seed)
    table = table.assign(confidence=confidence, p_value=np.minimum(p / DIFFERENCES, 1))
    table["least_p"] = min(least_p(drawn) / DIFFERENCES, 1)
    table["margin"] = np.where(comparable, _margins(margin, table["measure"]), np.nan)
    alpha = LEVEL / max(1, table["margin"].notna().sum())
    ends = (end - found.mean + table["estimate"] for end in found.interval(1 - 2 * alpha))
    table["equivalent"] = np.logical_and(*(end.abs() < table["margin"] for end in ends))
    asked = _neighbours_or_not(ours, theirs, of_each, k, seed).assign(**about)
    table = pd.concat([table, asked], ignore_index=True)
    table["decided"] = table["p_value"] <= LEVEL
    table["equivalent"] = table["equivalent"].eq(True)
    return table.reindex(columns=list(COLUMNS)).astype(COLUMNS)


def _matched(ours: Layers, theirs: Layers) -> tuple[Layers, Layers, bool]:
    """Both with the runs that are compared, and whether these are pairs."""
    if both := pair(ours.units, theirs.units):
        first, second = (_chosen(side, [of[i] for of in both]) for i, side in enumerate((ours, theirs)))
        return first, second, True
    if None in (*ours.tasks, *theirs.tasks):
        return ours, theirs, False
    shared = set(ours.tasks) & set(theirs.tasks)
    if not shared:
        raise AnalysisError(f"{ours.label} and {theirs.label} have no task in common; compare runs of the same tasks")
    kept = [_chosen(side, [unit for unit in side.units if unit.task in shared]) for side in (ours, theirs)]
    return kept[0], kept[1], False


def _sample(
    ours: Layers, theirs: Layers, measured: list[list[_Measured]], paired: bool, claim: str
) -> tuple[Sample, str]:
    """Values of all rows for each run, pair of runs or task; and what is relabelled."""
    first, second = (np.concatenate([of[i].values for of in measured], axis=1) for i in (0, 1))
    tasks = [*ours.tasks, *([] if paired else theirs.tasks)]
    if None in tasks:
        tasks = [None] * len(tasks)
    if claim == "tasks":
        places = [[[x == task for x in side.tasks] for side in (ours, theirs)] for task in dict.fromkeys(ours.tasks)]
        means = [first[place].mean(axis=0) - second[other].mean(axis=0) for place, other in places]
        return sample(np.array(means), [None] * len(means)), "signs of tasks"
    if paired:
        return sample(first - second, tasks), "signs of pairs"
    sides = np.repeat([1, -1], [len(first), len(second)])
    of = sample(np.concatenate([first, second]), tasks, sides)
    return of, "labels within tasks" if np.ptp(of.strata) else "labels"


def _compared(ours: Layers, theirs: Layers, measure: str) -> tuple[int | None, int | None]:
    """How many values or directions of either."""
    if measure in ours.overlaps:
        return ours.directions[1], theirs.directions[1]
    return (ours.rank, theirs.rank) if measure == "kl" else (min(ours.rank, theirs.rank),) * 2


def _comparable(ours: Layers, theirs: Layers, measure: str, k_a: int | None, k_b: int | None) -> bool:
    """Whether as many values are compared of both; of overlaps in tables that do not say it, chance does."""
    if measure in ours.overlaps and None in (k_a, k_b):
        return bool(np.isclose(ours.directions[0], theirs.directions[0], rtol=1e-3))
    return k_a == k_b


def _measured(side: Layers, measure: str, averaging: str, k: int | None) -> _Measured:
    weights = _weights(side.tasks)
    where = np.stack([1 - np.eye(len(side.layers)), neighbours(len(side.layers))])

    def means(matrices: Array) -> Array:
        """(..., L, L) to (..., 2)."""
        return _mean_known(np.where(where > 0, matrices[..., None, :, :], np.nan), (-2, -1))

    if measure in side.overlaps or averaging == "divergences":
        matrices = (
            side.overlaps[measure]
            if measure in side.overlaps
            else np.stack([_mean_known(_MATRICES[measure](run), 0) for run in side.spectra[..., :k]])
        )
        values = means(matrices)
        return _Measured(values, weights @ values, np.tensordot(weights, matrices, axes=1))
    spectra = _mean_known(side.spectra[..., :k])
    layers = _MATRICES[measure](np.tensordot(weights, spectra, axes=1))
    values = pseudo_values(spectra, weights, lambda mean: means(_MATRICES[measure](mean)))
    return _Measured(values, means(layers), layers)


def _weights(tasks: list[str | None]) -> Array:
    """Of the runs in a mean over tasks of means over runs; their sum is 1."""
    counts = {task: tasks.count(task) for task in tasks}
    return np.array([1 / (len(counts) * counts[task]) for task in tasks])


def _same_layer(ours: Layers, theirs: Layers, measure: str, averaging: str, k: tuple[int | None, int | None]) -> float:
    """Mean of the measure for the same layer in two runs of one task, over both methods; NaN where none is known."""
    if measure in ours.overlaps:
        known = [side.same_layer[measure] for side in (ours, theirs) if measure in side.same_layer]
        return float(np.mean(known)) if known else float("nan")
    values = []
    for side, most in ((ours, k[0]), (theirs, k[1])):
        spectra = side.spectra[..., :most]
        spectra = _mean_known(spectra)[:, None] if averaging == "spectra" else spectra
        for i, j in combinations(range(len(side.units)), 2):
            if side.tasks[i] == side.tasks[j]:
                both = np.stack([spectra[i], spectra[j]], axis=-2)
                matrices = _MATRICES[measure](both)
                values.append(np.nanmean((matrices[..., 0, 1] + matrices[..., 1, 0]) / 2))
    return float(np.mean(values)) if values else float("nan")


def _margins(margin: float | Mapping[str, float] | None, measures: pd.Series) -> Array:
    """The margin of each row; NaN where there is none."""
    if margin is None:
        margin = {}
    given = margin if isinstance(margin, Mapping) else dict.fromkeys(measures, margin)
    if unknown := sorted(set(given) - set(measures)):
        raise AnalysisError(
            f"margin is given for {unknown[0]}, which is not compared; there are {', '.join(dict.fromkeys(measures))}"
        )
    if wrong := [value for value in given.values() if not 0 < value < float("inf")]:
        raise AnalysisError(f"margin (--margin) must be greater than 0, not {wrong[0]:g}")
    return measures.map(given).to_numpy(dtype=np.float64)


def _neighbours_or_not(
    ours: Layers, theirs: Layers, of_each: dict[str, list[_Measured]], k: dict[str, Any], seed: int
) -> pd.DataFrame:
    """Do neighbours differ from layers further apart? A row for each measure and method."""
    asked = [
        (i, measure, side, of_each[measure][i].layers)
        for measure in of_each
        for i, side in enumerate((ours, theirs))
        if measure != "kl_matched" or k[measure][i] != side.rank  # else what kl says
    ]
    near, far, p = adjacent_test(np.stack([matrix for *_, matrix in asked]), seed=seed)
    return pd.DataFrame(
        {"question": "adjacent-distant", "measure": measure, "pairs": "adjacent", "a": side.label, "b": None}
        | {"value_a": near[row], "value_b": far[row], "estimate": near[row] - far[row]}
        | {"p_value": min(p[row] / (1 - DIFFERENCES), 1) if p[row] == p[row] else p[row]}
        | {"n_a": len(side.units), "k_a": k[measure][i], "paired": False, "resampled": "layers"}
        for row, (i, measure, side, _) in enumerate(asked)
    )


def _mean_known(values: Array, axis: int | tuple[int, int] = 1) -> Array:
    """Mean of what is there over the modules (axis 1), or other axes; NaN where nothing is, as of updates of zero."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(known, values, 0).sum(axis=axis) / known.sum(axis=axis)
    return mean


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
    of_a = {spectra.tobytes(): unit.run for unit, spectra in zip(sides[0].units, sides[0].spectra, strict=True)}
    for unit, spectra in zip(sides[1].units, sides[1].spectra, strict=True):
        if np.nan_to_num(spectra).any() and spectra.tobytes() in of_a:
            raise AnalysisError(
                f"{unit.run} stands on both sides (the other has it as {of_a[spectra.tobytes()]}): a run cannot be "
                "compared with itself or its copy"
            )
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
    overlaps, directions = _overlaps(side, runs, layers, stack, when)
    known_units = [by_run.get(run, Unit(run)) for run in runs]
    return Layers(side.label, layers, known_units, spectra, overlaps, directions, side.same_layer)


def _overlaps(
    side: Side, runs: list[str], layers: tuple[int, ...], stack: str, when: float
) -> tuple[dict[str, Array], tuple[float, int | None]]:
    """Overlap less chance of every pair of layers, mean over modules: (runs, L, L), NaN on the diagonal.

    Then how many directions they compare, as in ``Layers``: the median over the pairs, since few may have less.
    """
    if side.pairs is None:
        return {}, (float("nan"), None)
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
    by_chance = float(pairs["overlap_expected"].median())
    return found, (by_chance, int(pairs["k"].median()) if "k" in pairs else None)


def _chosen(side: Layers, chosen: list[Unit]) -> Layers:
    """The runs chosen, in that order; says which are left out."""
    if left := [unit.run for unit in side.units if unit not in chosen]:
        warnings.warn(
            f"{side.label}: {', '.join(left[:3])} ({len(left)} in all) left out, without a partner", stacklevel=4
        )
    index = [side.units.index(unit) for unit in chosen]
    overlaps = {name: values[index] for name, values in side.overlaps.items()}
    return side._replace(units=chosen, spectra=side.spectra[index], overlaps=overlaps)
