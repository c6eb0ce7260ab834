"""Differences of configurations that trained on the same tasks with the same seeds: their table and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

TITLES = {"cola": "CoLA", "stsb": "STS-B", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2", "qnli": "QNLI"}


def estimates(values: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The mean of each column over some tasks, of equal weight, with its 95 % interval by t.

    Args:
        values: Differences, indexed by task and seed, a column for each.
        groups: By name, the tasks to average over.

    Returns:
        Columns task (the name of the group), other (the column), pairs, difference, low, high, and of groups of several
        tasks p, corrected for all columns by exact or drawn sign flips (docs/statistics.md).
    """
    import pandas as pd

    from msplora_analysis.ask.comparison.uncertainty import estimate, p_values, sample

    rows = []
    for name, tasks in groups.items():
        of = values[values.index.get_level_values("task").isin(tasks)]
        drawn = sample(of.to_numpy(), of.index.get_level_values("task").tolist())
        found = estimate(drawn)
        low, high = found.interval(0.95)
        p = p_values(drawn) if len(tasks) > 1 else [float("nan")] * len(low)
        for i, other in enumerate(of):
            about = {"task": name, "other": other, "pairs": len(of)}
            rows.append(about | {"difference": found.mean[i], "low": low[i], "high": high[i], "p": p[i]})
    return pd.DataFrame(rows).round(5)


def beside(scores: pd.DataFrame, reference: str, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """:func:`estimates` of each column minus one of them, with the mean of the column.

    Args:
        scores: Indexed by task and seed, a column for each configuration.
        reference: The column that is subtracted.
        groups: As there.
    """
    table = estimates(scores.drop(columns=reference).sub(scores[reference], axis=0), groups)
    means = means_of(scores, groups)
    return table.assign(mean=[means[task][other] for task, other in zip(table["task"], table["other"], strict=True)])


def means_of(scores: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> dict[str, pd.Series]:
    """Of each group of tasks the mean of each column, tasks of equal weight."""
    by_task = scores.groupby("task").mean()
    return {name: by_task.loc[list(tasks)].mean() for name, tasks in groups.items()}


def groups_of(tasks: Sequence[str], without: str | None = None) -> dict[str, Sequence[str]]:
    """All tasks together, those without one of them, and each alone."""
    groups: dict[str, Sequence[str]] = {"average": tasks}
    if without in tasks:
        groups[f"without {TITLES[without]}"] = [task for task in tasks if task != without]
    return groups | {task: (task,) for task in tasks}


def draw(table: pd.DataFrame, path: Path, label: str) -> None:
    """A panel for each group of tasks, a line for each difference; table: of :func:`estimates`."""
    from matplotlib.figure import Figure

    others = list(dict.fromkeys(table["other"]))
    names = list(dict.fromkeys(table["task"]))
    figure = Figure(figsize=(7.2, 0.9 + 0.2 * len(others)), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        rows = table[table["task"] == name].set_index("other").loc[others]
        colour = "0.45" if name in TITLES else "#0072b2"
        for y, (low, high) in enumerate(zip(rows["low"], rows["high"], strict=True)):
            ax.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=1)
        ax.plot(100 * rows["difference"], range(len(others)), "o", color=colour, markersize=3.5)
        ax.axvline(0, color="0.6", linewidth=0.8)
        ax.set_title(TITLES.get(name, name), fontsize=8)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(others)), others)
    axes[0].set_ylim(len(others) - 0.5, -0.5)
    figure.supxlabel(label, fontsize=8)
    figure.savefig(path, dpi=150)
