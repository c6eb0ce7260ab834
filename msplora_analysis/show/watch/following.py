"""A run folder that grows: what is known of it, and reading what is new."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.adapters.layouts import DIFFUSERS_NAMES, adapters_in, describe, settings_of
from msplora_analysis.compute.measures.registry import columns, measures
from msplora_analysis.compute.results import Failure, Spectra
from msplora_analysis.compute.tasks import compute
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Folder, parts, read_json, walk
from msplora_analysis.options import NO_MOMENTS, Execution, Options
from msplora_core.names import RECORD, STATE
from msplora_core.records import TRAINER_STATE

if TYPE_CHECKING:
    import pandas as pd

_SETTLING = 5.0  # seconds without a change after which a folder without trainer_state.json counts as written
_GIVEN_UP = 30.0  # seconds without a change after which a folder that cannot be read is no longer being written
_OPTIONS = Options(ignore_unknown=True, moments=NO_MOMENTS)

Signature = tuple[tuple[str, int, int, int], ...]  # of files: name, inode, size, time of change


class Means(NamedTuple):
    """Means over the matrices of one scale and module type; effective_rank is None if all are zero."""

    effective_rank: float | None
    norm: float
    rank: float
    matrices: int


class Point(NamedTuple):
    """One checkpoint that was read, with its means by (scale, module type); or why it could not be."""

    adapter: Adapter
    result: Spectra | Failure
    means: dict[tuple[str, str], Means]


class Run:
    """What is known of the run in ``folder``: nothing, until ``update``.

    Attributes:
        points: Its checkpoints, in order, those deleted meanwhile too.
        deleted: How many of them are.
        writing: Names of checkpoints that are not whole yet.
        problems: Names of folders that cannot be read, and why.
        settings: What run.json says; empty without one.
        history: What Trainer logged until the newest checkpoint.
        epochs: How many it trains.
        finished: Whether run.json has results.
    """

    def __init__(self, folder: Path, *, cache: bool = True) -> None:
        self.folder = folder
        self.points: list[Point] = []
        self.deleted = 0
        self.writing: list[str] = []
        self.problems: dict[str, str] = {}
        self.settings: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.epochs: float | None = None
        self.finished = False
        self._cache = cache
        self._known: dict[Path, Signature] = {}  # folder -> that of what was read there
        self._seen: dict[Path, tuple[Signature, float]] = {}  # folder -> that of the last looks, and since when
        self._run: tuple[str, ...] = ()

    def update(self) -> Iterator[Point]:
        """Read what is new, one checkpoint after another.

        Raises:
            AnalysisError: If the folder holds several runs.
        """
        self.writing = []
        folders = list(self._folders())
        self._forget({place for place, _ in folders})
        self._read_record()
        fresh: list[tuple[Adapter, Path, Signature]] = []
        for place, files in folders:
            signature = _signature(place, files)
            if signature and signature != self._known.get(place):
                fresh += [(adapter, place, signature) for adapter in self._adapters(place, files, signature)]
        fresh.sort(key=lambda item: _order(item[0]))
        results = compute([adapter for adapter, *_ in fresh], _OPTIONS, Execution(cache=self._cache))
        for (adapter, place, signature), result in zip(fresh, results, strict=True):
            if isinstance(result, Failure) and not result.not_finite:
                self._not_read(place, signature, result.message)
                continue
            self._known[place] = signature
            self.problems.pop(self._name(place), None)
            means = _means(result) if isinstance(result, Spectra) else {}
            point = Point(adapter, result, means)
            self._keep(point)
            yield point

    def findings(self) -> pd.DataFrame:
        """What ``diagnose`` says of the checkpoints known; layers and scales are compared at the newest."""
        from msplora_analysis.ask.evidence import of_results
        from msplora_analysis.ask.findings import diagnose

        return diagnose(of_results([point.result for point in self.points], _OPTIONS, Execution()))

    @property
    def name(self) -> str:
        return self.points[0].adapter.run if self.points else self.folder.name

    def _folders(self) -> Iterator[tuple[Path, set[str]]]:
        if not self.folder.is_dir():
            return
        try:
            for folder in walk(self.folder, set()):
                yield Path(str(folder.place)), folder.files
        except AnalysisError:  # deleted while it was being listed: the next look will tell
            return

    def _forget(self, present: set[Path]) -> None:
        """Count what was deleted; a run of which nothing is left will start anew."""
        self.deleted = sum(not Path(str(point.adapter.file)).is_file() for point in self.points)
        if self.points and self.deleted == len(self.points):
            self.points, self.deleted, self.history, self._run = [], 0, [], ()
        for place in self._known.keys() - present - {self.folder / RECORD}:
            del self._known[place]
        self.problems = {name: why for name, why in self.problems.items() if (self.folder / name) in present}

    def _read_record(self) -> None:
        """The record of msplora-train, which is written anew at the end."""
        file = self.folder / RECORD
        try:
            status = file.stat()
            signature = ((file.name, status.st_ino, status.st_size, status.st_mtime_ns),)
            if self._known.get(file) == signature:
                return
            record = read_json(file)
        except (OSError, AnalysisError):  # there is none, or it is being written
            return
        self._known[file] = signature
        self.settings = settings_of(record)
        self.finished = "results" in record

    def _adapters(self, place: Path, files: set[str], signature: Signature) -> Sequence[Adapter]:
        """Those of a folder that changed; none while it is being written."""
        if STATE not in files and self._age(place, signature) < _SETTLING:
            self.writing.append(self._name(place))
            return []
        try:
            folder = Folder(str(place), files, [], parts(place), str(place))
            found = adapters_in(folder)
            adapters = [adapter for name in found for adapter in discover(place / name)]
            for adapter in adapters:
                adapter.read()  # while errors are caught
            if found and STATE in files:
                self._read_state(place / STATE)
        except AnalysisError as error:
            self._not_read(place, signature, str(error))
            return []
        if not adapters:  # other files than adapters
            self._known[place] = signature
        for name in found:
            self._check_one_run(describe(folder, name).run)
        return adapters

    def _read_state(self, file: Path) -> None:
        state = read_json(file, TRAINER_STATE)
        history = state.get("log_history") or []
        if len(history) >= len(self.history):
            self.history = history
        self.epochs = state.get("num_train_epochs") or self.epochs

    def _not_read(self, place: Path, signature: Signature, message: str) -> None:
        if self._age(place, signature) < _GIVEN_UP:
            self.writing.append(self._name(place))
        else:
            self._known[place] = signature  # until it changes
            self.problems[self._name(place)] = message

    def _age(self, place: Path, signature: Signature) -> float:
        """Seconds since the last change of a folder: by their times, or by our looks if the clock was set back."""
        if self._seen.get(place, ((), 0.0))[0] != signature:
            self._seen[place] = signature, time.monotonic()
        written = max(changed for *_, changed in signature) / 1e9
        return max(time.time() - written, time.monotonic() - self._seen[place][1])

    def _keep(self, point: Point) -> None:
        """In its place; an older one of the same step, which was written anew, goes."""
        others = [p for p in self.points if _order(p.adapter) != _order(point.adapter)]
        self.points = sorted([*others, point], key=lambda p: _order(p.adapter))

    def _check_one_run(self, run: tuple[str, ...]) -> None:
        self._run = self._run or run
        if run != self._run:
            names = " and ".join("/".join(each[-2:]) for each in (self._run, run))
            raise AnalysisError(f"{self.folder}: holds several runs, such as {names}; watch one of them")

    def _name(self, place: Path) -> str:
        return place.relative_to(self.folder).as_posix() if place != self.folder else "."


def _signature(place: Path, files: set[str]) -> Signature:
    """Of the files that tell of an adapter, as long as they are not changed; empty without any."""
    found = []
    for name in sorted(files):
        if name in (*DIFFUSERS_NAMES, STATE) or name.startswith("adapter_") or name.endswith(".safetensors"):
            try:
                status = os.stat(place / name)
            except OSError:  # deleted just now
                continue
            found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _order(adapter: Adapter) -> tuple[bool, float, float]:
    step, epoch = adapter.step, adapter.epoch
    return not adapter.dated, step or 0, epoch or 0


def _means(result: Spectra) -> dict[tuple[str, str], Means]:
    values = columns(measures("watch"), result.sigma, [row.frobenius for row in result.rows])
    groups: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(result.rows):
        groups.setdefault((row.scale, row.module), []).append(i)
    found = {}
    for key, members in groups.items():
        effective = values["effective_rank"][members]
        known = effective[~np.isnan(effective)]
        norm = float(values["frobenius"][members].mean())
        rank = float(np.mean([result.rows[i].rank for i in members]))
        found[key] = Means(float(known.mean()) if len(known) else None, norm, rank, len(members))
    return found
