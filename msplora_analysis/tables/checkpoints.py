"""The last checkpoint of a run, and which checkpoints of which runs may be set side by side."""

import math
import warnings
from collections.abc import Iterable

import pandas as pd

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.errors import AnalysisError


def times(table: pd.DataFrame) -> pd.Series:
    """0, 1, ... over the checkpoints of each run: by step, or by epoch in a run without steps.

    Args:
        table: Any with the columns run, step and epoch.

    Returns:
        A float for each row. In a run without steps and epochs it is 0; in others it is NaN where a row has no place
        among them, as that of the adapter saved once more at the end.
    """
    run = table["run"]
    step, epoch = (table[name].astype("Float64").astype("float64") for name in ("step", "epoch"))
    place = step.where(step.groupby(run).transform("count") > 0, epoch)
    numbered = place.groupby(run).rank(method="dense") - 1
    return numbered.where(place.groupby(run).transform("count") > 0, 0.0)


def last_checkpoints(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last checkpoint of each run (see ``times``)."""
    when = times(table)
    return table[when == when.groupby(table["run"]).transform("max")]


def newest(adapters: Iterable[Adapter]) -> list[Adapter]:
    """The last checkpoint of each run; one without step and epoch only where there is no other.

    Args:
        adapters: In order within each run, as ``discover`` gives them.
    """
    latest: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.run not in latest or adapter.dated:
            latest[adapter.run] = adapter
    return list(latest.values())


def adapters_at(adapters: Iterable[Adapter], epoch: float | None = None) -> list[Adapter]:
    """One adapter of each run: that of the epoch, or else of the last that all runs have; without epochs the last.

    Args:
        adapters: In order within each run, as ``discover`` gives them: the last of an epoch counts.
        epoch: None for the last that all have.
    """
    of_run: dict[str, dict[float | None, Adapter]] = {}
    for adapter in adapters:
        of_run.setdefault(adapter.run, {})[adapter.epoch] = adapter
    shared = set.intersection(*(set(found) for found in of_run.values()))
    wanted = epoch if epoch is not None else max((e for e in shared if e is not None), default=None)
    return [found.get(wanted) or list(found.values())[-1] for found in of_run.values()]


def one_per_epoch(matrices: pd.DataFrame) -> pd.DataFrame:
    """At most one checkpoint per run and epoch.

    Where a run has epochs, its checkpoints without one (the adapter saved once more at the end) have no place on the
    axis and are left out; where it has none, its last step stands for it. Of several steps of one epoch the last
    counts.
    """
    timed = matrices.groupby("run")["epoch"].transform("count") > 0
    matrices = matrices[~timed | matrices["epoch"].notna()]
    last = matrices.groupby(["run", "epoch"], dropna=False)["step"].transform("max")
    kept = matrices[last.isna() | (matrices["step"] == last)]
    unplaced = sorted(set(matrices.loc[matrices["epoch"].isna() & ~matrices.index.isin(kept.index), "run"]))
    if unplaced:
        warnings.warn(f"{_listed(unplaced)}: no epochs known, so only the last step is drawn", stacklevel=4)
    return kept


def align(matrices: pd.DataFrame) -> pd.DataFrame:
    """Within each method, keep the epochs that all its runs share, and warn of what that leaves out.

    Where the runs share none, each keeps its last checkpoint, without an epoch.
    """
    return pd.concat([_align(str(label), part) for label, part in matrices.groupby("variant", sort=False)])


def _align(label: str, part: pd.DataFrame) -> pd.DataFrame:
    epochs = {run: set(rows["epoch"].dropna()) for run, rows in part.groupby("run", sort=False)}
    timed = [run for run in epochs if epochs[run]]
    if not timed:
        return part
    if len(timed) < len(epochs):
        unknown = _listed([str(run) for run in epochs if not epochs[run]])
        warnings.warn(f"{label}: left out {unknown}, whose epochs are not known", stacklevel=5)
        part = part[part["run"].isin(timed)]
    shared = set.intersection(*(epochs[run] for run in timed))
    if not shared:
        warnings.warn(f"{label}: its {len(timed)} runs share no epoch; only the last of each is drawn", stacklevel=5)
        last = part.groupby("run")["epoch"].transform("max")
        return part[part["epoch"] == last].assign(epoch=math.nan)
    if any(epochs[run] != shared for run in timed):
        span = f"{len(shared)} epochs that all share ({min(shared):g} to {max(shared):g})"
        warnings.warn(f"{label}: its {len(timed)} runs have different epochs; drawn are the {span}", stacklevel=5)
    return part[part["epoch"].isin(shared)]


def epochs_of(matrices: pd.DataFrame) -> list[float]:
    return sorted(matrices["epoch"].dropna().unique().tolist())


def at_epoch(matrices: pd.DataFrame, epoch: float | None = None) -> pd.DataFrame:
    """The rows of one checkpoint per run: `epoch`, or else the last epoch that all methods in `matrices` share.

    A method whose epochs are not known has one checkpoint only, which is taken. Methods that share no epoch are
    each taken at their own last one.
    """
    have = {str(label): epochs_of(part) for label, part in matrices.groupby("variant", sort=False)}
    if epoch is not None:
        for label, epochs in have.items():
            if epoch not in epochs:
                shared = ", ".join(f"{e:g}" for e in epochs) or "none"
                raise AnalysisError(f"epoch {epoch:g} is not there for all runs of {label}: choose one of {shared}")
        return matrices[matrices["epoch"] == epoch]
    timed = {label: set(epochs) for label, epochs in have.items() if epochs}
    common = set.intersection(*timed.values()) if timed else set()
    chosen = {label: max(common or epochs) for label, epochs in timed.items()}
    if timed and not common:
        warnings.warn(f"{_listed(list(timed))} share no epoch: each is shown at its own last one", stacklevel=3)
    elif any(chosen[label] < max(timed[label]) for label in timed):
        warnings.warn(f"{_listed(list(timed))}: compared at epoch {max(common):g}, the last they share", stacklevel=3)
    return matrices[matrices["epoch"].isna() | (matrices["epoch"] == matrices["variant"].map(chosen))]


def _listed(names: list[str]) -> str:
    """The names, at most four of them in full."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
