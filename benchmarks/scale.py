"""Many small adapters: one worker, two, Dask; what the cache saves; whether memory stays flat."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapters
from adapters import Case, Linear
from measure import HERE, launch, quartiles

COUNT = 2000  # adapters
NEW = 20  # that come before a later call
WORKERS = 2
CHECKPOINTS = 50  # of each run
PARTS = (0.1, 0.5, 1)  # of the runs, to see how memory grows
ROUNDS, CACHE_ROUNDS = 5, 3  # at most

_LINEARS = tuple(Linear(f"attention.self.{module}", 384, 384) for module in ("query", "value"))
RUN = Case("run", "MiniLM q,v r 4", "encoder.layer", 6, _LINEARS, 4, "float32", epochs=CHECKPOINTS)

Command = list[str | Path]
Row = dict[str, Any]


class Scale:
    """Measures ``msplora-analyze spectra`` (``analyze``) on ``count`` adapters, kept under ``data``."""

    def __init__(self, analyze: Path, data: Path, count: int, rounds: int) -> None:
        self.analyze, self.rounds = analyze, rounds
        self.runs = [_run(f"run-{i + 1}", CHECKPOINTS, data) for i in range(-(-count // CHECKPOINTS))]
        self.grown = [*self.runs, _run("new", NEW, data)]
        self.tables: list[tuple[int, Path]] = []  # number of runs and folder of the tables of every command

    def measure(self) -> Row:
        with tempfile.TemporaryDirectory() as scratch:
            self.scratch = Path(scratch)
            result: Row = {
                "title": f"{RUN.title}, {RUN.dtype}",
                "adapters": len(self.runs) * CHECKPOINTS,
                "runs": len(self.runs),
                "bytes": len(self.runs) * RUN.nbytes,
                "workers": self.workers(),
                "cache": self.cache(),
                "memory": self.memory(),
            }
            return result | {"identical": self.identical()}

    def workers(self) -> list[Row]:
        """One worker, several, and Dask, in turns that begin with another each time."""
        one, more, dask = "--workers 1", f"--workers {WORKERS}", f"--dask, {WORKERS} workers"
        taken: dict[str, list[Row]] = {one: [], more: [], dask: []}
        failed: dict[str, str] = {}
        with _cluster(WORKERS) as address:
            commands = {
                one: self._command(self.runs, "--workers", "1", "--no-cache"),
                more: self._command(self.runs, "--workers", str(WORKERS), "--no-cache"),
            }
            if address:
                commands[dask] = self._command(self.runs, "--dask", address, "--no-cache")
            else:
                failed[dask] = "not run: no cluster could be started (is Dask installed?)"
            labels = list(commands)
            for turn in range(min(ROUNDS, self.rounds) + 1):
                shift = turn % len(labels)
                for label in (*labels[shift:], *labels[:shift]):
                    measured = launch(commands[label])
                    if turn > 0:  # the first one warms up
                        taken[label].append(measured)
        rows: list[Row] = []
        for label, found in taken.items():
            if label in failed:
                rows.append({"command": label, "failed": failed[label]})
                continue
            ratios = {f"of_{base}": _ratios(found, taken[base]) for base in (one, more)}
            rows.append({"command": label, **_times(found), **ratios})
        return rows

    def cache(self) -> list[Row]:
        """A first call, a second, and one with new adapters; each round has a cache of its own."""
        commands = {
            "first call": self._command(self.runs),
            "second call": self._command(self.runs),
            f"with {NEW} new adapters": self._command(self.grown),
        }
        taken: dict[str, list[Row]] = {label: [] for label in commands}
        for turn in range(min(CACHE_ROUNDS, self.rounds)):
            folder = self.scratch / f"cache-{turn}"
            for label, command in commands.items():
                measured: Row = launch(command, variables={"MSPLORA_CACHE": str(folder)})
                taken[label].append(measured | {"bytes": sum(file.stat().st_size for file in folder.iterdir())})
        launch(self._command(self.grown, "--no-cache"))  # what the last tables must equal
        return [
            {
                "call": label,
                **_times(found),
                "of_first": _ratios(found, taken["first call"]),
                "bytes": found[-1]["bytes"],
            }
            for label, found in taken.items()
        ]

    def memory(self) -> list[Row]:
        """Peak of the whole process tree, for parts of the adapters."""
        rows = []
        for workers in (1, WORKERS):
            for part in PARTS:
                runs = self.runs[: max(1, round(part * len(self.runs)))]
                found = launch(self._command(runs, "--workers", str(workers), "--no-cache"), sample=True)
                row: Row = {"command": f"--workers {workers}", "adapters": len(runs) * CHECKPOINTS}
                row |= {key: found[key] for key in ("maxrss", "pss", "anonymous")}
                rows.append(row | {"memory": max(found["maxrss"], found["pss"])})
        return rows

    def identical(self) -> bool:
        """Whether both tables of the same runs had the same bytes, whichever way they were computed."""
        found: dict[int, set[tuple[bytes, ...]]] = {}
        for runs, folder in self.tables:
            tables = tuple((folder / f"{name}.parquet").read_bytes() for name in ("spectra", "metrics"))
            found.setdefault(runs, set()).add(tables)
        return all(len(tables) == 1 for tables in found.values())

    def _command(self, runs: Sequence[Path], *options: str) -> Command:
        folder = self.scratch / f"tables-{len(self.tables)}"
        self.tables.append((len(runs), folder))
        return [self.analyze, "spectra", *runs, "--out", folder, *options]


def _run(name: str, checkpoints: int, data: Path) -> Path:
    return adapters.make(replace(RUN, name=name, epochs=checkpoints), data / "scale")


def _times(found: Sequence[Row]) -> Row:
    return {key: quartiles([row[key] for row in found]) for key in ("wall", "cpu")}


def _ratios(found: Sequence[Row], base: Sequence[Row]) -> dict[str, float]:
    """Of wall times, each to that of the same round."""
    return quartiles([own["wall"] / other["wall"] for own, other in zip(found, base, strict=True)])


@contextmanager
def _cluster(workers: int) -> Iterator[str]:
    """The address of a Dask cluster on this machine; empty if none could be started."""
    with subprocess.Popen(
        [sys.executable, HERE / "cluster.py", str(workers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout
        yield process.stdout.readline().strip()
