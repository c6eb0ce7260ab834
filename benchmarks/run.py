"""Measure msplora_analysis against pread and other tools, side by side: ``make bench``, README.md.

Writes results.json (all medians, quartiles, versions) and results.md (tables, targets).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import report
from adapters import CASES, HARD, Case
from contenders import DEFAULT_BLOCK
from measure import HERE, Contender, Failed, launch, machine, quartiles, take_turns, use_cores
from scale import COUNT, Scale

CHECKED = 16  # matrices of a file whose singular values are checked
SIGNIFICANT = 1e-5  # of sigma_1: above it the relative error counts

Result = dict[str, Any]


class Bench:
    """What all measurements share, and the versions that they find."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data: Path = arguments.data
        self.rivals: Path | None = arguments.rivals
        self.rounds: int = arguments.rounds
        self.budget: float = arguments.budget
        self.cores: int = arguments.cores
        self.versions: dict[str, dict[str, str]] = {}

    def compute(self, case: Case) -> list[Result]:
        """From files to singular values in memory: every contender, in turns with pread."""
        say(f"{case.label}: {case.title}")
        base = self._contender("pread", "pread", case)
        others = self._own(case) + (self._rivals(case) if self.rivals else [])
        failed: dict[str, str] = {}
        with ExitStack() as stack:
            stack.enter_context(base)
            running = []
            for contender in others:
                try:
                    running.append(stack.enter_context(contender))
                except Failed as error:
                    failed[contender.label] = str(error)
            failed |= take_turns(base, running, self.rounds, self.budget)
            errors: dict[str, float] = {}
            for contender in running:
                self._note(contender)
                if contender.label not in failed and contender.name != "pread":
                    try:
                        errors[contender.label] = _worst_error(contender)
                    except Failed as error:
                        failed[contender.label] = str(error)
        rows = [_compute_row(case, contender, errors, failed) for contender in others]
        for label, reason in _left_out(case).items() if self.rivals else ():
            rows.append({"case": case.label, "contender": label, "failed": reason})
        return rows

    def accuracy(self) -> list[Result]:
        """Worst relative error on spectra that fall to 1e-5 of sigma_1."""
        say(f"accuracy: {HARD.title}")
        rows = []
        for contender in self._own(HARD, workers=(1,)) + (self._rivals(HARD) if self.rivals else []):
            if contender.name == "pread":
                continue
            row: Result = {"contender": contender.label}
            try:
                with contender:
                    contender.run()
                    row["error"] = _worst_error(contender)
            except Failed as error:
                row["failed"] = str(error)
            rows.append(row)
        return rows

    def command(self, case: Case) -> list[Result]:
        """The whole command ``msplora-analyze spectra`` and gradience's, in turns; then the memory of each."""
        say(f"{case.label}: whole commands")
        folder = adapters.make(case, self.data)
        tables = self.data / "tables"
        analyze: list[str | Path] = [_beside(sys.executable, "msplora-analyze"), "spectra", folder, "--out", tables]
        commands: dict[str, list[str | Path]] = {"msplora-analyze spectra": [*analyze, "--no-cache"]}
        if self.rivals:
            audit: list[str | Path] = [_beside(self.rivals, "gradience"), "audit", "--no-udr", "--json", "--layers"]
            audit += ["--top-singular-values", str(case.rank), "--peft-dir", adapters.files(folder)[0].parent]
            commands["gradience audit"] = audit
            commands["gradience audit, one rank policy"] = [*audit, "--rank-policies", "energy@0.90"]
        walls: dict[str, list[float]] = {label: [] for label in commands}
        failed: dict[str, str] = {}
        for _ in range(self.rounds):
            for label, command in commands.items():
                spent = walls[label]
                if label in failed or (spent and sum(spent) + max(spent) > 2 * self.budget):
                    continue
                try:
                    spent.append(launch(command)["wall"])
                except Failed as error:
                    failed[label] = str(error)
        rows: list[Result] = []
        for label, command in commands.items():
            row: Result = {"case": case.label, "command": label}
            rows.append(row)
            if label in failed:
                row["failed"] = failed[label]
                continue
            memory = launch(command, sample=True)
            row |= {key: memory[key] for key in ("maxrss", "pss", "anonymous")}
            row["memory"] = max(row["maxrss"], row["pss"])
            row["weight"] = 1 if label.startswith("msplora") else case.files  # gradience takes one adapter a call
            row["wall"] = _scaled(quartiles(walls[label]), row["weight"])
            pairs = zip(walls["msplora-analyze spectra"], walls[label], strict=False)
            row["ratio"] = quartiles([own / (other * row["weight"]) for own, other in pairs])
            row["memory_ratio"] = rows[0]["memory"] / row["memory"]
        return rows

    def help(self) -> list[Result]:
        """CPU seconds of ``msplora-analyze --help``, in turns with a Python that does nothing."""
        say("--help")
        commands: dict[str, list[str | Path]] = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "msplora-analyze --help": [_beside(sys.executable, "msplora-analyze"), "--help"],
        }
        turns = [[launch(command)["cpu"] for command in commands.values()] for _ in range(self.rounds + 2)][1:]
        rows: list[Result] = []
        for i, label in enumerate(commands):
            cpu, ratio = ([turn[i] for turn in turns], [turn[i] / turn[0] for turn in turns])
            rows.append({"command": label, "cpu": quartiles(cpu), "ratio": quartiles(ratio)})
        return rows

    def scale(self, count: int) -> Result:
        """Many small adapters: workers, Dask, cache, memory."""
        say(f"{count} small adapters")
        return Scale(_beside(sys.executable, "msplora-analyze"), self.data, count, self.rounds).measure()

    def _own(self, case: Case, workers: Sequence[int] = (1, 2)) -> list[Contender]:
        blocks = self._contender("pread, 8 MiB blocks", "pread", case, block=DEFAULT_BLOCK)
        return [blocks] + [self._contender(f"msplora, {_processes(n)}", "msplora", case, workers=n) for n in workers]

    def _rivals(self, case: Case) -> list[Contender]:
        """Other tools; the slow ones on a part of the case, in float32 only."""
        result = [
            self._contender("torch QR", "torch-qr", case, threads=self.cores),
            self._contender("gradience", "gradience", case, rank=case.rank),
        ]
        if case.dtype != "float32":
            return result
        small = case.part(layers=None if case.files > 1 else 1, epochs=min(1, case.epochs))
        if case is HARD:
            small = case
        if case.name != "XL":  # see _left_out
            weight = case.matrices / small.matrices
            result.append(self._contender("WeightWatcher", "weightwatcher", small, weight=weight))
        if case.rank == 8:
            dense = {"": (small, case.matrices / small.matrices)}
        else:  # one matrix of each shape, a transpose being the same shape
            dense = {}
            shapes = [{linear.rows, linear.cols} for linear in case.linears]
            for linear, shape in zip(case.linears, shapes, strict=True):
                if case.name != "XL" and shapes.index(shape) == case.linears.index(linear):
                    part = case.part(layers=1, modules=(linear.module,))
                    dense[f", {linear.rows}×{linear.cols}"] = (part, case.layers * shapes.count(shape))
        for which, (part, weight) in dense.items():
            label = f"torch dense SVD{which}"
            result.append(self._contender(label, "torch-dense", part, weight=weight, threads=self.cores))
        return result

    def _contender(self, label: str, name: str, case: Case, *, weight: float = 1, **arguments: Any) -> Contender:
        files = [str(file.absolute()) for file in adapters.files(adapters.make(case, self.data))]
        own = name in ("pread", "msplora")
        python = Path(sys.executable) if own or self.rivals is None else self.rivals
        return Contender(label, name, python, {"files": files, **arguments}, weight)

    def _note(self, contender: Contender) -> None:
        self.versions.setdefault("msplora" if contender.own else "rivals", {}).update(contender.versions)


def _left_out(case: Case) -> dict[str, str]:
    if case.label == "XL float32":
        return {
            "torch dense SVD": "not run: one of its 560 matrices of up to 28672×8192 takes minutes",
            "WeightWatcher": "not run: one of its 80 layers took more than 5 minutes (on a busy machine)",
        }
    return {}


def _compute_row(case: Case, contender: Contender, errors: dict[str, float], failed: dict[str, str]) -> Result:
    row: Result = {"case": case.label, "contender": contender.label}
    if contender.label in failed:
        return row | {"failed": failed[contender.label]}
    row["weight"] = contender.weight
    row["pread"] = quartiles([base for base, _ in contender.pairs])
    row["seconds"] = _scaled(quartiles([own for _, own in contender.pairs]), contender.weight)
    row["ratio"] = _scaled(quartiles([own / base for base, own in contender.pairs]), contender.weight)
    if contender.label in errors:
        row["error"] = errors[contender.label]
    return row


def _scaled(values: dict[str, float], weight: float) -> dict[str, float]:
    return {key: value if key == "n" else value * weight for key, value in values.items()}


def _worst_error(contender: Contender) -> float:
    """Largest relative error of the sigmas that count, against QR in float64 (numpy) of the same file.

    WeightWatcher tells the largest and the smallest of each spectrum: these two are compared.
    """
    spectra = contender.sigma()
    worst = 0.0
    for name, a, b in islice(adapters.factors(Path(contender.arguments["files"][-1])), CHECKED):
        r_a, r_b = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (a.T, b))
        exact = np.linalg.svd(r_b @ r_a.T, compute_uv=False)
        if contender.name == "weightwatcher":
            exact = exact[[0, -1]]
        counts = exact >= SIGNIFICANT * exact[0]
        found = np.array(spectra[name])
        if found.shape != exact.shape:
            raise SystemExit(f"error: {contender.label}: {name} has {found.size} singular values, not {exact.size}")
        worst = max(worst, float(np.max(np.abs(found / exact - 1)[counts])))
    return worst


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _beside(python: str | Path, command: str) -> Path:
    return Path(python).parent / command


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:4.0f} s] {text}", file=sys.stderr, flush=True)


START = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure msplora_analysis; see README.md beside this file.")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE",
                        help=f"any of {', '.join(repr(label) for label in CASES)} (default: all)")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS),
                        help="parts to measure (default: all)")  # fmt: skip
    parser.add_argument("--rivals", type=Path, help="Python of the environment with torch, weightwatcher and gradience")
    parser.add_argument("--data", type=Path, default=Path(".bench/adapters"), help="where the adapters are kept")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.md and results.json")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each comparison (default 9)")
    parser.add_argument("--budget", type=float, default=15, metavar="SECONDS",
                        help="most time of one contender in one case; slow ones get fewer rounds")  # fmt: skip
    parser.add_argument("--count", type=int, default=COUNT,
                        help=f"small adapters of the part \"scale\" (default {COUNT})")  # fmt: skip
    parser.add_argument("--cores", type=int, default=2, help="cores for all that is measured (default 2)")
    arguments = parser.parse_args()
    if arguments.rivals:  # not resolve(): the interpreter of an environment is a link out of it
        arguments.rivals = arguments.rivals.absolute()
        if not arguments.rivals.is_file():
            parser.error(f"--rivals {arguments.rivals}: no such file; `make bench` makes it")

    about = machine(use_cores(arguments.cores))
    if about["cores"] < arguments.cores:
        say(f"only {about['cores']} of {arguments.cores} cores are there")
    bench = Bench(arguments)
    cases = [CASES[label] for label in arguments.cases]
    results: Result = {"machine": about}
    if "compute" in arguments.only:
        results["compute"] = [row for case in cases for row in bench.compute(case)]
    if "accuracy" in arguments.only:
        results["accuracy"] = bench.accuracy()
    if "command" in arguments.only:
        whole = [case for case in cases if case.dtype == "float32" or case.name == "L"]
        results["command"] = [row for case in whole for row in bench.command(case)]
    if "help" in arguments.only:
        results["help"] = bench.help()
    if "scale" in arguments.only:
        results["scale"] = bench.scale(arguments.count)
    about["load_after"] = os.getloadavg()[0]
    about["versions"] = bench.versions
    about["seconds"] = round(time.perf_counter() - START)
    results["targets"] = report.targets(results)

    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(report.rounded(results), indent=1) + "\n")
    (arguments.out / "results.md").write_text(report.markdown(results))
    say(f"written: {arguments.out / 'results.md'}, {arguments.out / 'results.json'}")


PARTS = ("compute", "accuracy", "command", "help", "scale")

if __name__ == "__main__":
    main()
