"""Are layers redundant? What layers of one run share, beside null models: other seeds, random directions, rotation.

Layers of one run are held against the same layers of runs with another seed, so runs of one method and task belong
together, at their last checkpoint. ``tables.nulls`` says which parts of an update are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from msplora_analysis.adapters.discovery import as_paths, discover
from msplora_analysis.ask.comparison.pairing import units
from msplora_analysis.ask.comparison.uncertainty import estimate, sample
from msplora_analysis.compute.measures.reliability import normalised_overlap
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Options, Progress
from msplora_analysis.tables.checkpoints import newest
from msplora_analysis.tables.nulls import MEASURES, Run, read_run, tables_of

if TYPE_CHECKING:
    import pandas as pd

_CHANCE = {"overlap": "expected", "shared": "shared_expected"}
_KINDS = ("adjacent", "across", "same_layer")
COLUMNS = {
    "method": "str", "part": "str", "measure": "str", "runs": "Int64", "tasks": "Int64", "adjacent": "float64",
    "across": "float64", "same_layer": "float64", "chance": "float64", "normalised": "float64", "low": "float64",
    "high": "float64",
}  # fmt: skip


class Nulls(NamedTuple):
    """``summary``: a row for each method, part and measure. ``pairs``: for each two layers. ``joint``: for each run."""

    summary: pd.DataFrame
    pairs: pd.DataFrame
    joint: pd.DataFrame


def load_nulls(
    paths: StrPath | Iterable[StrPath],
    *,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    top_k: int | None = None,
    moments: StrPath | None = None,
    progress: Progress | None = None,
) -> Nulls:
    """What layers share, beside what they share with layers of another seed, and in how few parameters.

    Args:
        paths: Adapters, run folders or folders of such, as for ``load_spectra``. Runs of one method and one task are
            held against each other: from two seeds on there is a null model, from three an interval.
        ignore_unknown: See ``load_tables``.
        semantics: See ``load_tables``.
        top_k: The most directions that overlaps compare; shared energy is always of all.
        moments: See ``load_tables``.
        progress: Called after each run.

    Returns:
        Three tables, whose columns docs/tables.md has: ``summary``, ``pairs`` and ``joint``.

    Raises:
        AnalysisError: the input cannot be used; an update that is no product of factors.

    Example:
        >>> ma.load_nulls("runs/cola").summary[["part", "measure", "adjacent", "across", "same_layer", "chance"]]
    """
    options = Options(ignore_unknown, semantics, top_k=top_k, moments=moments)
    return read_nulls(as_paths(paths), options, progress)


def read_nulls(paths: Sequence[StrPath], options: Options, progress: Progress | None = None) -> Nulls:
    """``load_nulls``, for options in hand."""
    adapters = discover(paths)
    last = newest(adapters)
    tasks = {unit.run: unit.task or "" for unit in units([adapter.run for adapter in last], last)}
    starts = {adapter.run: adapter for adapter in adapters if adapter.step == 0 or adapter.epoch == 0}
    runs: dict[tuple[str, str], list[Run]] = {}
    for done, adapter in enumerate(last):
        run = read_run(adapter, starts.get(adapter.run), options)
        runs.setdefault((run.method, tasks[run.name]), []).append(run)
        if progress:
            progress(done + 1, len(last))
    pairs, joint = tables_of(runs, options.top_k)
    if pairs.empty:
        raise AnalysisError(f"{paths[0]}: nothing to compare: no two layers of one stack with a module of one shape")
    return Nulls(summary(pairs), pairs, joint)


def summary(pairs: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    """What layers share, beside null models: a row for each method, part and measure.

    Returns:
        Columns method, part, measure, runs, tasks, adjacent (neighbours of one run), across (the same two layers, of
        two runs of one task), same_layer (one layer, of two runs), chance; all means over tasks. normalised is
        (adjacent − across) / (same_layer − chance), with its t interval low, high over runs within tasks (pseudo-values
        of the jackknife); no interval where a task has fewer than three runs.
    """
    import pandas as pd

    rows = []
    for (method, part), of in pairs.groupby(["method", "part"], sort=False):
        for measure in MEASURES:
            name, _, side = measure.partition("_")
            chance = of[f"{_CHANCE[name]}_{side}"]
            kinds = _kinds(of.assign(value=of[measure], chance=chance))
            by_task = {task: _means(rows_, None) for task, rows_ in kinds.groupby("task", sort=False)}
            means = np.mean(list(by_task.values()), axis=0)
            low, high = _interval(kinds, confidence)
            names = {*of["run_i"], *of["run_j"]}
            rows.append(
                {"method": method, "part": part, "measure": measure, "runs": len(names), "tasks": len(by_task)}
                | dict(zip((*_KINDS, "chance"), means, strict=True))
                | {"normalised": float(normalised_overlap(*means)), "low": low, "high": high}
            )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def _kinds(of: pd.DataFrame) -> pd.DataFrame:
    """With a column ``kind``; pairs that are none of them are left out."""
    one_run = of["run_i"] == of["run_j"]
    layers = sorted({*of["group_i"], *of["group_j"]})
    place = {layer: number for number, layer in enumerate(layers)}
    apart = (of["group_i"].map(place) - of["group_j"].map(place)).abs()
    kind = np.select([one_run & (apart == 1), ~one_run & (apart == 1), ~one_run & (apart == 0)], _KINDS, "")
    return of.assign(kind=kind)[kind != ""]


def _means(rows: pd.DataFrame, without: str | None) -> tuple[float, ...]:
    """Means of the three kinds, and chance; of the runs but one."""
    if without is not None:
        rows = rows[(rows["run_i"] != without) & (rows["run_j"] != without)]
    means = rows.groupby("kind")["value"].mean()
    return (*(float(means.get(kind, np.nan)) for kind in _KINDS), float(rows["chance"].mean()))


def _interval(kinds: pd.DataFrame, confidence: float) -> tuple[float, float]:
    """Of the normalised overlap, from what each run adds to it."""
    by_task = dict(iter(kinds.groupby("task", sort=False)))
    whole = {task: _means(rows, None) for task, rows in by_task.items()}
    point = float(normalised_overlap(*np.mean(list(whole.values()), axis=0)))
    values, tasks = [], []
    for task, rows in by_task.items():
        names = sorted({*rows["run_i"], *rows["run_j"]})
        if len(names) < 3:  # without one of two runs there is nothing across runs
            return float("nan"), float("nan")
        for run in names:
            left = np.mean(list((whole | {task: _means(rows, run)}).values()), axis=0)
            # A run of one task moves the mean over tasks: its own value stands len(by_task) times further out.
            values.append(point + len(by_task) * (len(names) - 1) * (point - float(normalised_overlap(*left))))
            tasks.append(task)
    found = estimate(sample(np.array(values)[:, None], tasks))
    low, high = found.interval(confidence)
    shift = point - found.mean
    return float((low + shift)[0]), float((high + shift)[0])
