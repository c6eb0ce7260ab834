"""How things are measured: contenders in turn, whole commands, and the machine that it is done on."""

from __future__ import annotations

import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
TIMEOUT = 600.0  # seconds of one run
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Failed(Exception):
    """A contender or command that cannot be measured; the message says why."""


@dataclass
class Contender:
    """A contender of contenders.py as a process. ``own``: of this package, not a rival.

    weight: how many times what is run here the whole case has (1: it is run as a whole).
    """

    label: str
    name: str
    python: Path
    arguments: dict[str, Any]
    weight: float = 1.0
    pairs: list[tuple[float, float]] = field(default_factory=list)  # seconds of the base line, then its own
    versions: dict[str, str] = field(default_factory=dict)
    spent: float = 0.0

    @property
    def own(self) -> bool:
        return self.name in ("pread", "msplora")

    def __enter__(self) -> Contender:
        environment = {key: value for key, value in os.environ.items() if key not in _THREADS}
        if self.own:
            environment["OPENBLAS_NUM_THREADS"] = "1"  # as the command msplora-analyze does
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [self.python, HERE / "contenders.py", self.name, json.dumps(self.arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        try:
            self.versions = self._answer()
        except Failed:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdout.close()
        try:
            self._process.stdin.close()
            self._process.wait(5)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def run(self) -> float:
        """Seconds of one run, taken inside its process."""
        seconds: float = self._ask("run")
        self.spent += seconds
        return seconds

    def sigma(self) -> dict[str, list[float]]:
        """Singular values of the last file of the last run, by module."""
        spectra: dict[str, list[float]] = self._ask("sigma")
        return spectra

    def _ask(self, request: str) -> Any:
        assert self._process.stdin
        try:
            print(request, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(self._last_error()) from None
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], TIMEOUT)[0]:
            self._process.kill()
            raise Failed(f"stopped after {TIMEOUT:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._last_error())
        return json.loads(line)

    def _last_error(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"ended with status {self._process.returncode}"


def take_turns(base: Contender, contenders: Sequence[Contender], rounds: int, budget: float) -> dict[str, str]:
    """Rounds in which each contender runs right after the base line, whose time it is paired with.

    The first round warms up and does not count, except for a contender that takes long (a third of
    ``budget``). A contender leaves when its next run would exceed ``budget`` seconds in all.
    Returns the labels of those that failed, with the reason.
    """
    failed: dict[str, str] = {}
    for turn in range(rounds + 1):
        shift = turn % len(contenders)
        for contender in (*contenders[shift:], *contenders[:shift]):
            expected = max((seconds for _, seconds in contender.pairs), default=0.0)
            if contender.label in failed or (contender.pairs and contender.spent + expected > budget):
                continue
            try:
                pair = (base.run(), contender.run())
            except Failed as error:
                failed[contender.label] = str(error)
                continue
            if turn > 0 or pair[1] > budget / 3:
                contender.pairs.append(pair)
            if not contender.own:
                time.sleep(0.3)  # its idle threads may spin a while
    return failed


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of ``values``."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "q1": float(low), "q3": float(high), "n": len(values)}


def launch(
    command: Sequence[str | Path], *, sample: bool = False, variables: Mapping[str, str] | None = None
) -> dict[str, float]:
    """What launch.py tells of one run of ``command``. Raises Failed unless it ends with status 0.

    variables: of its environment, beside those of this process.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _THREADS} | dict(variables or {})
    arguments = [sys.executable, "-S", HERE / "launch.py", *(["--sample"] if sample else []), *command]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, error = process.communicate(timeout=TIMEOUT)
    except BaseException as reason:
        os.killpg(process.pid, signal.SIGKILL)  # the command too
        process.communicate()
        if isinstance(reason, subprocess.TimeoutExpired):
            raise Failed(f"stopped after {TIMEOUT:.0f} s") from None
        raise
    if process.returncode:
        raise Failed(error.strip().splitlines()[-1])
    result: dict[str, Any] = json.loads(output)
    errors = result.pop("stderr").strip().splitlines()
    if status := result.pop("status"):
        raise Failed(errors[-1] if errors else f"ended with status {status}")
    return result


def use_cores(count: int) -> list[int]:
    """Keep this process and all that it starts on ``count`` cores; returns their numbers."""
    chosen: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(cpu)
        chosen.setdefault(siblings, cpu)
    cpus = list(chosen.values())[:count]
    os.sched_setaffinity(0, cpus)
    return cpus


def machine(cpus: Sequence[int]) -> dict[str, Any]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "cpu": ", ".join(sorted(models)) or platform.machine(),
        "cores": len(cpus),
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numpy_blas": f"{blas['name']} {blas['version']}",
        "load_before": os.getloadavg()[0],
    }
