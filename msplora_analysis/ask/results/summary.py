"""Scores of runs as one table: a row a method, a column a task, means over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from msplora_analysis.ask.results.records import Score, find_records, read_score
from msplora_analysis.errors import AnalysisError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("model", "method", "parameters", "task", "metric", "mean", "deviation", "runs", "seeds", "epochs")
AVERAGE = "average"
_T = TypeVar("_T")


def load_results(paths: Sequence[str] | str, at: str = "best") -> pd.DataFrame:
    """What runs scored: a row for every model, method and task.

    Args:
        paths: Run folders of ``msplora-train``, or folders of such.
        at: ``best``: of each run the epoch with the best metric on the validation split, which is how the
            paper's tables are made and flatters every method alike; ``last``: the last epoch.

    Returns:
        ``model``, ``method``, ``parameters`` (trainable, without the head), ``task``, ``metric``, ``mean`` and
        ``deviation`` (sample standard deviation over runs, empty for one run), ``runs``, ``seeds``,
        ``epochs`` (those chosen). A method that has every task of its model also has a row with the task
        ``average``: the mean of its tasks' means. ``table.attrs["unfinished"]`` lists runs without results.

    Raises:
        AnalysisError: no runs; a run.json of something else; runs of one method and task that differ in more
            than the seed, or repeat a seed.

    Example:
        >>> ma.load_results("examples/runs")[["method", "task", "mean", "runs"]]
    """
    if at not in ("best", "last"):
        raise AnalysisError(f"at={at!r}: expected best or last")
    folders = find_records([paths] if isinstance(paths, str) else paths)
    scores = {folder: read_score(folder, at) for folder in folders}
    table = tabulate([score for score in scores.values() if score is not None])
    table.attrs["unfinished"] = [str(folder) for folder, score in scores.items() if score is None]
    return table


def tabulate(scores: Sequence[Score]) -> pd.DataFrame:
    """The table of :func:`load_results`, of scores in hand. Rows in the order in which methods and tasks come."""
    import pandas as pd

    cells: dict[tuple[str, str, str], list[Score]] = {}
    for score in scores:
        cells.setdefault((score.model, score.method, score.task), []).append(score)
    rows = []
    for (model, method, task), runs in cells.items():
        _check_repetitions(runs)
        values = pd.Series([run.value for run in runs])
        rows.append(
            {
                "model": model,
                "method": method,
                "parameters": _only({run.parameters for run in runs}, runs, "numbers of parameters"),
                "task": task,
                "metric": _only({run.metric for run in runs}, runs, "metrics"),
                "mean": values.mean(skipna=False),
                "deviation": values.std(skipna=False),
                "runs": len(runs),
                "seeds": ",".join(str(run.seed) for run in runs),
                "epochs": ",".join(str(run.epoch) for run in runs),
            }
        )
    table = pd.DataFrame(rows, columns=[*COLUMNS])
    return pd.concat([table, _averages(table)], ignore_index=True) if rows else table


def _averages(table: pd.DataFrame) -> pd.DataFrame:
    """The mean of the tasks' means, of every method that has them all; nothing where tasks' metrics do not add up."""
    rows = []
    for model, of_model in table.groupby("model", sort=False):
        tasks = of_model["task"].nunique()
        if tasks < 2 or "perplexity" in set(of_model["metric"]):
            continue
        for method, of_method in of_model.groupby("method", sort=False):
            if len(of_method) == tasks:
                parameters = of_method["parameters"]
                rows.append(
                    {
                        "model": model,
                        "method": method,
                        "parameters": parameters.iloc[0] if parameters.nunique() == 1 else None,
                        "task": AVERAGE,
                        "metric": AVERAGE,
                        "mean": of_method["mean"].mean(skipna=False),
                        "runs": of_method["runs"].sum(),
                        "seeds": "",
                        "epochs": "",
                    }
                )
    return table.iloc[:0] if not rows else type(table)(rows, columns=[*COLUMNS])


def _check_repetitions(runs: Sequence[Score]) -> None:
    """Runs of one cell repeat each other with other seeds, and differ in nothing else."""
    first = runs[0]
    seen: dict[int, Path] = {}
    for run in runs:
        if run.seed in seen:
            raise AnalysisError(
                f"{run.folder} and {seen[run.seed]} are both {run.method} on {run.task} with seed {run.seed}; "
                "give only one of them"
            )
        seen[run.seed] = run.folder
        names = sorted(first.recipe.keys() | run.recipe.keys())
        different = [name for name in names if first.recipe.get(name) != run.recipe.get(name)]
        if different:
            told = ", ".join(f"{name} {first.recipe.get(name)!r} and {run.recipe.get(name)!r}" for name in different)
            raise AnalysisError(
                f"{first.folder} and {run.folder} are both {run.method} on {run.task} but differ in {told}; "
                "a mean over them would say nothing: give runs that differ in the seed alone"
            )


def _only(values: set[_T], runs: Sequence[Score], what: str) -> _T:
    if len(values) > 1:
        raise AnalysisError(f"{runs[0].folder} and others have different {what}: {sorted(map(str, values))}")
    return values.pop()
