"""Which run of one method belongs to which of another: runs of one task and one seed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.layouts import nearest_json, settings_of
from msplora_core.names import RECORD, TASKS

_SEED = re.compile(r"(?:^|[/_.-])seed[-_=]?([0-9]{1,9})(?![0-9])")


@dataclass(frozen=True)
class Unit:
    """One run, and what it is a repetition of; task and seed are None where nothing tells them."""

    run: str
    task: str | None = None
    seed: int | None = None


def units(runs: Iterable[str], adapters: Sequence[Adapter] = ()) -> list[Unit]:
    """Task and seed of each run: from the run.json above one of its adapters, else from its name.

    A name tells the seed as in ``seed-3``, the task by a folder of its path that is called like it.
    """
    files = {adapter.run: adapter.file for adapter in adapters}
    found = []
    for run in runs:
        settings = settings_of(nearest_json(files[run], RECORD)) if run in files else {}
        task, seed = settings.get("task"), settings.get("seed")
        match = _SEED.search(run)
        names = [re.sub("[^a-z0-9]", "", part.lower()) for part in run.split("/")]
        if not isinstance(task, str):
            task = next((name for name in names if name in TASKS), None)
        if not isinstance(seed, int):
            seed = int(match[1]) if match else None
        found.append(Unit(run, task, seed))
    return found


def pair(ours: Sequence[Unit], theirs: Sequence[Unit]) -> list[tuple[Unit, Unit]]:
    """Units of equal task and seed, if both are known and each is there once; in the order of ``ours``."""
    sides = []
    for side in (ours, theirs):
        keys = [(unit.task, unit.seed) for unit in side]
        sides.append({key: unit for key, unit in zip(keys, side, strict=True) if key[1] is not None})
        if len(set(keys)) < len(keys):
            return []
    return [(unit, sides[1][key]) for key, unit in sides[0].items() if key in sides[1]]
