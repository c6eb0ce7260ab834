"""One mutation after another, and what is held against each."""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

from fuzz.commands import CHEAP, COMMANDS
from fuzz.folders import spoil_cache, spoil_links, spoil_rows
from fuzz.healthy import SEEDS, write_run
from fuzz.pickles import spoil_parts, spoil_torch
from fuzz.programs import spoil_gguf, spoil_mlx, spoil_yaml
from fuzz.tables import spoil_ablation, spoil_measured, spoil_moments, spoil_table
from fuzz.weights import Spoiler, spoil_header, spoil_index, spoil_json, spoil_name, spoil_values

SECONDS = 60  # of CPU time for one mutation in one command

KINDS: dict[str, Spoiler] = {
    "header": spoil_header,
    "names": spoil_name,
    "values": spoil_values,
    "config": spoil_json("adapter_config.json"),
    "state": spoil_json("trainer_state.json"),
    "record": spoil_json("run.json"),
    "torch": spoil_torch,
    "parts": spoil_parts,
    "index": spoil_index,
    "parquet": spoil_table(".parquet"),
    "csv": spoil_table(".csv"),
    "links": spoil_links,
    "rows": spoil_rows,
    "moments": spoil_moments,
    "ablation": spoil_ablation,
    "measured": spoil_measured,
    "gguf": spoil_gguf,
    "mlx": spoil_mlx,
    "yaml": spoil_yaml,
    "cache": spoil_name,  # the cache is spoiled between two calls
}
"""Each spoils a run, and says what is to be read."""
_ANY = [name for name in COMMANDS if name not in ("rows", "base", "measure", "compress moments")]
_TABLES = ("diagnose", "report", "compare", "figures")
_WEIGHED = ("load", "spectra", "redundancy", "advise", "compress moments", "share", "measure", "report", "check")
_FOR = {
    "rows": ("rows",),
    "index": ("base", "extract", "check"),
    "cache": ("load", "spectra"),
    "parquet": _TABLES,
    "csv": _TABLES,
    "measured": ("measure",),
    "moments": _WEIGHED,
    "ablation": ("advise", "figures", "report"),
}

Outcome = tuple[str, str, str]
"""Kind, command, and how it ended."""


@contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU time, which other programs do not stretch
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@cache
def _choices(kinds: Sequence[str], commands: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each kind the commands that it goes to, each with how often: so that each takes the same time."""
    choices = {
        kind: {name: 1 / COMMANDS[name][1] for name in commands if name in _FOR.get(kind, _ANY)} for kind in kinds
    }
    return {kind: of for kind, of in choices.items() if of}


@cache
def _shares(kinds: Sequence[str], commands: Sequence[str]) -> dict[str, float]:
    """How often each kind is chosen: the dearer what it goes to is, the rarer, but by the root of that alone."""
    return {kind: (sum(of.values()) / len(of)) ** 0.5 for kind, of in _choices(kinds, commands).items()}


def _drawn(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def run_one(rng: random.Random, root: Path, kinds: Sequence[str], commands: Sequence[str]) -> Outcome:
    """One mutation in one command. Raises whatever must not be."""
    from msplora_analysis.errors import AnalysisError
    from msplora_core.errors import TrainingError

    kinds, commands = tuple(kinds), tuple(commands)
    kind = _drawn(rng, _shares(kinds, commands))
    command = _drawn(rng, _choices(kinds, commands)[kind])
    tensors, config = rng.choice(SEEDS)
    run, out = root / "runs" / "run", root / "out"
    shutil.rmtree(root / "runs", ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    path = KINDS[kind](rng, write_run(run, tensors, config), tensors)
    if kind == "cache":
        spoil_cache(rng, root, path)
    before = sorted(map(str, (root / "runs").rglob("*")))
    shown, told = io.StringIO(), io.StringIO()
    outcome = "done"
    try:
        with warnings.catch_warnings(), redirect_stdout(shown), redirect_stderr(told), _deadline(SECONDS):
            warnings.simplefilter("ignore")
            COMMANDS[command][0](path, out, rng)
    except (AnalysisError, TrainingError) as error:
        outcome, message = "error", str(error)
        assert message.isprintable(), repr(message)
        assert len(message) < 2000, message
    except TimeoutError:
        raise
    except (OSError, SystemExit):  # the command line makes one line of an OSError
        outcome = "error"
    for text in (shown.getvalue(), told.getvalue()):
        assert all(letter.isprintable() or letter == "\n" for letter in text), repr(text)
    _check_written(out)
    assert sorted(map(str, (root / "runs").rglob("*"))) == before, "files changed"
    return kind, command, outcome


def _check_written(out: Path) -> None:
    for file in out.rglob("*"):
        assert not file.name.startswith("."), f"left: {file.name}"
        if file.suffix == ".csv":
            for line in file.read_text().splitlines():
                assert not any(cell.lstrip('"').startswith(("=", "@")) for cell in line.split(",")), line
        if file.suffix in (".csv", ".md", ".sarif", ".json"):
            text = file.read_text()
            assert all(letter.isprintable() or letter in "\n\r\t" for letter in text), repr(text)


def fuzz(
    count: int, root: Path, seed: int = 0, kinds: Sequence[str] = tuple(KINDS), commands: Sequence[str] = CHEAP
) -> Counter[Outcome]:
    """Outcomes of ``count`` mutations, by kind and command.

    Raises AssertionError, with the seed, for any that must not be.
    """
    outcomes: Counter[Outcome] = Counter()
    for i in range(count):
        os.environ["MSPLORA_CACHE"] = ""
        try:
            outcomes[run_one(random.Random(f"{seed}-{i}"), root, kinds, commands)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}-{i}: {type(error).__name__}: {error}") from error
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Mutated files through every command.")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--commands", default=",".join(COMMANDS), help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these")
    parser.add_argument("--keep-going", action="store_true", help="count what must not be, and go on")
    args = parser.parse_args()
    kinds, commands = args.kinds.split(","), args.commands.split(",")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))  # no mutation fills the disk
    start, done, faults = time.perf_counter(), Counter[Outcome](), Counter[str]()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as root:
        for i in range(args.first, args.first + args.count):
            if time.perf_counter() - start > args.seconds:
                break
            os.environ["MSPLORA_CACHE"] = ""
            try:
                done[run_one(random.Random(f"{args.seed}-{i}"), Path(root), kinds, commands)] += 1
            except Exception as error:
                if not args.keep_going:
                    print(f"seed {args.seed}-{i}", file=sys.stderr)
                    raise
                at = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {str(error)[:100]!r}"
                if not faults[text]:
                    print(f"seed {args.seed}-{i}: {text}", file=sys.stderr, flush=True)
                faults[text] += 1
    seconds = time.perf_counter() - start
    for name, place in (("kind", 0), ("command", 1), ("outcome", 2)):
        counted: Counter[str] = Counter()
        for key, number in done.items():
            counted[key[place]] += number
        print(f"{name}: {dict(counted)}")
    took = f"{seconds:.0f} s, {time.process_time():.0f} s of them computing"
    print(f"{done.total()} mutations without fault, {faults.total()} with, in {took}")
