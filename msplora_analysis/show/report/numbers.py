"""The numbers behind charts and tables, column by column, as JSON takes them: few digits, None where there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from msplora_analysis.compute.measures.registry import Array, Measure, Place, measures
from msplora_analysis.errors import printable
from msplora_analysis.formats.names import stack_and_layer
from msplora_analysis.formats.updates import SCALES
from msplora_analysis.tables.columns import task_measures

if TYPE_CHECKING:
    import pandas as pd

    from msplora_analysis.ask.advice.advise import RunAdvice
    from msplora_analysis.tables.matrices import Matrices

DIGITS = 4
VALUES = 200_000
"""Most singular values in a page (1.3 MB): more checkpoints than that allows are thinned, and the page says so."""

PAIRS = 40_000
"""Most pairs of layers in a page (1.8 MB), but those of the first run: further runs have none, and the page says so."""

_SAID = {"m_eff_1": "share of the largest singular value"}
"""What the page calls a measure, where not as all do."""


def _measures(place: Place) -> dict[str, Measure]:
    """Name -> measure; what tells how broad a spectrum is comes first, what tells how large comes last."""
    order = ("broad", "concentrated", "large")
    return {one.name: one for one in sorted(measures(place), key=lambda one: (order.index(one.high), one.name))}


MEASURES = {name: _SAID.get(name, one.label) for name, one in _measures("report").items()}
"""Of the curves: name -> what the page calls it."""

TITLES = {name: one.symbol for name, one in _measures("matrices").items()}
"""Of the table of matrices: name -> head of its column."""

TASK_TITLES = {"task_norm": "task norm", "task_effective_rank": "task eff. rank"}
"""Measures of task-weighted spectra, where these are."""

Columns = dict[str, list[Any]]
Places = Mapping[str, str]  # name of a matrix -> where it is


def rounded(values: Iterable[Any]) -> list[Any]:
    """Numbers to ``DIGITS`` significant digits, whole ones as int; None for NaN, infinities and empty cells."""
    return [_rounded(value) for value in np.asarray(list(values), dtype=np.float64).tolist()]


def _rounded(value: float) -> float | int | None:
    if not np.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short == int(short) and abs(short) < 2**53 else short


def axis_of(keys: pd.DataFrame) -> str:
    """The column that tells checkpoints apart: 'epoch' or 'step' where either does in all runs, else 'time'."""
    checkpoints = keys.groupby("run")["time"].nunique()
    for name in ("epoch", "step"):
        if keys[name].notna().all() and keys.groupby("run")[name].nunique().eq(checkpoints).all():
            return name
    return "time"


def places_of(names: Iterable[str]) -> dict[str, str]:
    """Name of a matrix -> where it is, but for its layer: 'query', or its path with * where several end in one name."""
    paths = {name: _path(name) for name in names}
    alike = Counter(path.rpartition(".")[2] for path in set(paths.values()))
    return {
        name: printable(short if alike[short := path.rpartition(".")[2]] == 1 else path) for name, path in paths.items()
    }


def _path(name: str) -> str:
    stack, layer = stack_and_layer(name)
    return name if layer is None else f"{stack}.*{name.removeprefix(f'{stack}.{layer}')}"


def means(matrices: Matrices, runs: Sequence[str], axis: str) -> Columns:
    """Mean of each of ``MEASURES`` over the matrices of one run, scale and checkpoint."""
    keys, sigma, task = matrices
    values = {name: one.function(sigma) for name, one in _measures("report").items()}
    values |= {} if task is None else task_measures(list(task))
    table = keys[["run", "scale", "time"]].assign(when=keys[axis], **values)
    rows = table.groupby(["run", "scale", "time"], sort=False).mean().reset_index()
    columns: Columns = {"run": [runs.index(run) for run in rows["run"]], "scale": rows["scale"].tolist()}
    return columns | {name: rounded(rows[name]) for name in ("when", *values)}


def spectra(matrices: Matrices, runs: Sequence[str], axis: str, places: Places) -> tuple[list[dict[str, Any]], str]:
    """For each run its checkpoints (``when``) and ``panels``, one of each place and kind (parts, or whole updates).

    A panel has ``units`` (rows of its picture), ``k`` and, for each checkpoint, sigma unit by unit; and as ``task`` the
    task-weighted ones, where they are known. Second: what of it is left out, in a sentence, or ''.
    """
    keys, sigma, task = matrices
    share = min(1.0, VALUES / max(int(keys["rank"].sum()), 1))
    found, left = [], 0
    for run in runs:
        rows = np.flatnonzero(keys["run"] == run)
        of_run = keys.iloc[rows]
        times = np.unique(of_run["time"])
        count = max(1, int(len(times) * share))
        # The last one is kept, whatever else is.
        kept = times[np.round(np.linspace(len(times) - 1, 0, count)).astype(int)[::-1]]
        left += len(times) - len(kept)
        labels = of_run["name"].map(places)
        whole = of_run["scale"] == "total"
        panels = []
        groups: dict[Any, Any] = of_run.groupby([labels, whole], sort=False).indices
        for (place, is_whole), chosen in groups.items():
            panel = _panel(of_run.iloc[chosen], sigma[rows[chosen]], kept)
            if task is not None and np.isfinite(task[rows[chosen]]).any():
                panel["task"] = _panel(of_run.iloc[chosen], task[rows[chosen]], kept)["values"]
            panels.append({"place": place, "kind": "whole" if is_whole else "parts", **panel})
        when = of_run.drop_duplicates("time").set_index("time", drop=False)[axis][kept]
        found.append({"when": rounded(when), "panels": panels})
    note = (
        f"{left} of {left + sum(len(run['when']) for run in found)} checkpoints are left out here, evenly, "
        if left
        else ""
    )
    return found, note + "to keep the page small: the last of each run are all there." if note else ""


def _panel(keys: pd.DataFrame, sigma: Array, times: Any) -> dict[str, Any]:
    units = keys.drop_duplicates(["scale", "group", "name"])
    units = units.sort_values(["scale", "group"], key=lambda c: c.map(SCALES.index) if c.name == "scale" else c)
    row = {unit: i for i, unit in enumerate(_identities(units))}
    width = int(keys["rank"].max())
    values = np.full((len(times), len(row), width), np.nan)
    column = {time: i for i, time in enumerate(times)}
    for time, identity, rank, line in zip(keys["time"], _identities(keys), keys["rank"], sigma, strict=True):
        if time in column:
            values[column[time], row[identity], :rank] = line[:rank]
    return {
        "units": [unit_name(scale, group) for scale, group in zip(units["scale"], units["group"], strict=True)],
        "k": width,
        "values": [rounded(of_time.ravel()) for of_time in values],
    }


def _identities(keys: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(zip(keys["scale"], keys["group"].fillna(-1), keys["name"], strict=True))


def unit_name(scale: str, group: Any) -> str:
    """'layer 3', 'mid 0', 'global'; the whole update of a layer too is called by its layer."""
    if group is None or group != group:
        return scale if scale != "layer" else "not in a layer"
    return "global" if scale == "global" and group == 0 else f"{'layer' if scale == 'total' else scale} {int(group)}"


PAIR_VALUES = ("kl_ij", "kl_ji", "overlap_in", "overlap_out", "expected_in", "expected_out", "cosine")


def pairs(table: pd.DataFrame, runs: Sequence[str], places: Places) -> tuple[list[dict[str, Any]], str]:
    """A panel of every run, place and scale that has two units: its ``groups``, and columns of pairs (i, j in them).

    A column of one value throughout is that value. Whole updates are left out: they share parts by design. Second: what
    else is left out, in a sentence, or ''.
    """
    table = table[table["scale"] != "total"]
    sizes = table.groupby("run").size().reindex(list(runs)).dropna()
    kept = sizes.index[(sizes.cumsum() <= PAIRS) | (sizes.cumsum() == sizes)]
    table = table[table["run"].isin(kept)]
    panels = []
    labels = table["name_i"].map(places) if "name_i" in table else table["module"].map(printable)
    for (run, place, scale), rows in table.groupby([table["run"], labels, table["scale"]], sort=False):
        groups = list(dict.fromkeys([*rows["group_i"], *rows["group_j"]]))
        index = {group: i for i, group in enumerate(groups)}
        values = {name: rows.get(name, rows["overlap_expected"]) for name in PAIR_VALUES}
        panels.append(
            {"run": runs.index(run), "place": place, "scale": scale, "groups": [int(group) for group in groups]}
            | {"i": [index[group] for group in rows["group_i"]], "j": [index[group] for group in rows["group_j"]]}
            | {name: _shortest(rounded(column.astype("float64"))) for name, column in values.items()}
        )
    left = len(sizes) - len(kept)
    return panels, f"Left out, to keep the page small: the matrices of {left} of {len(sizes)} runs." if left else ""


def _shortest(column: list[Any]) -> Any:
    return column[0] if len(set(column)) == 1 else column


def matrix_table(matrices: Matrices, runs: Sequence[str], places: Places) -> Columns:
    """Measures of every matrix at the last checkpoint of its run."""
    keys, sigma, task = matrices.where(matrices.keys["last"])
    shape = [f"{int(r)} × {int(c)}" if r == r else None for r, c in zip(keys["rows"], keys["cols"], strict=True)]
    numbers = {"rank": keys["rank"]} | {name: one.function(sigma) for name, one in _measures("matrices").items()}
    numbers |= {} if task is None else task_measures(list(task))
    return {
        "run": [runs.index(run) for run in keys["run"]],
        "place": [places[name] for name in keys["name"]],
        "scale": keys["scale"].tolist(),
        "group": rounded(keys["group"]),
        "shape": shape,
        **{name: rounded(column) for name, column in numbers.items()},
    }


ENERGIES = {"energy": "Energy kept, of Σσ²", "task_energy": "Energy kept, task-weighted"}
"""Of the charts against rank: the column of the table of ranks -> title."""


def energies(advice: Sequence[RunAdvice], runs: Sequence[str]) -> dict[str, Columns]:
    """Name of an energy that is known -> columns run, when (the rank every module is cut to) and value."""
    found: dict[str, Columns] = {}
    for name in ENERGIES:
        tables = [(runs.index(one.subject.adapter.run), one.ranks.dropna(subset=[name])) for one in advice]
        run = [run for run, table in tables for _ in range(len(table))]
        if run:
            columns = {key: rounded(v for _, table in tables for v in table[key]) for key in ("rank", name)}
            found[name] = {"run": run, "when": columns["rank"], "value": columns[name]}
    return found


def curves(of_runs: Sequence[Mapping[str, Sequence[tuple[float, float]]]]) -> dict[str, Columns]:
    """Name of a curve -> columns run, when, value; losses first."""
    first = ("training loss", "validation loss")
    names = sorted({name for curve in of_runs for name in curve}, key=lambda name: (name not in first, name))
    found = {}
    for name in names:
        points = [(run, *point) for run, curve in enumerate(of_runs) for point in curve.get(name, ())]
        run, when, value = zip(*points, strict=True)
        found[printable(name)] = {"run": list(run), "when": rounded(when), "value": rounded(value)}
    return found
