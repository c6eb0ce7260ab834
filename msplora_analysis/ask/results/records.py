"""The score of one run, from the run.json that ``msplora-train`` writes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.files.addresses import natural_key, read_json, walk
from msplora_core.names import RECORD, method_label
from msplora_core.records import SCORED_RUN

# Of runs recorded before run.json named its metric.
_METRICS = {"cola": "matthews_correlation", "stsb": "pearson", "acceptability": "matthews_correlation"}

# Settings that differ between runs of one cell or between tasks; all others belong to a row of the table.
_NOT_THE_METHOD = ("task", "data_dir", "seed", "model")


@dataclass(frozen=True)
class Score:
    """The score of one run.

    Args:
        folder: The run folder.
        settings: What the run was trained with, as run.json has it.
        parameters: Trainable parameters without the task's head.
        metric: Name of the metric.
        greater_is_better: False for a perplexity.
        value: The metric in the epoch asked for.
        epoch: That epoch.
    """

    folder: Path
    model: str
    task: str
    seed: int
    method: str
    parameters: int
    settings: dict[str, Any]
    metric: str
    greater_is_better: bool
    value: float
    epoch: int

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that must be equal in runs that only repeat each other."""
        return {name: value for name, value in self.settings.items() if name not in _NOT_THE_METHOD}


def find_records(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The run folders at or below ``paths``, each once, in natural order within its path.

    Raises AnalysisError for a path that does not exist or has no run below it.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise AnalysisError(f"{path}: no such folder; give run folders of msplora-train, or folders of such")
        found = [Path(str(folder.place)) for folder in walk(path, set()) if RECORD in folder.files]
        if not found:
            raise AnalysisError(f"{path}: no {RECORD} in it or below; give run folders of msplora-train")
        found.sort(key=lambda folder: [*map(natural_key, folder.parts)])
        folders |= {folder.resolve(): folder for folder in found}  # the same run may be given twice
    return list(folders.values())


def read_score(folder: Path, at: str) -> Score | None:
    """The score of a run; None for one that has not finished.

    Args:
        at: ``best``: the epoch with the best metric (as the paper's tables are made), or ``last``.

    Raises AnalysisError if run.json is not what msplora-train writes.
    """
    record = read_json(folder / RECORD, SCORED_RUN)
    settings, results = record["settings"], record.get("results")
    if not results:
        return None
    metric = record.get("metric") or {"name": _METRICS.get(settings["task"], "accuracy"), "greater_is_better": True}
    sign = 1 if metric["greater_is_better"] else -1
    # not before training: that is the base model's score; and not at a higher rank than the run came to
    cut = max((cut["step"] for cut in record.get("cuts") or ()), default=0)
    trained = [result for result in results if result["epoch"] > 0 and result["step"] >= cut] or results
    chosen = trained[-1] if at == "last" else max(trained, key=lambda result: _rank(result["metric"], sign))
    ranks = settings.get("ranks") or settings.get("rank")
    return Score(
        folder=folder,
        model=printable(record["model"]["name"]),
        task=printable(settings["task"]),
        seed=settings["seed"],
        method=printable(method_label(settings["method"], ranks, settings.get("anneal"))),
        parameters=record["parameters"]["adapter"],
        settings=settings,
        metric=printable(metric["name"]),
        greater_is_better=metric["greater_is_better"],
        value=_number(chosen["metric"]),
        epoch=chosen["epoch"],
    )


def _rank(metric: float | None, sign: int) -> float:
    """What the best epoch has most of; one that is not defined (a constant prediction) is the worst."""
    value = _number(metric)
    return -math.inf if math.isnan(value) else sign * value


def _number(value: float | None) -> float:
    """A metric; one that is not defined is shown as missing."""
    return math.nan if value is None else float(value)
