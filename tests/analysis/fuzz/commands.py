"""The commands that mutations go through, and what each costs."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.healthy import SEEDS, write_model, write_run
from fuzz.tables import MEASUREMENT

Command = Callable[[Path, Path, random.Random], None]
"""Reads a path, writes to a folder."""


def _command(line: str) -> Command:
    def call(path: Path, out: Path, rng: random.Random) -> None:
        words = [word.format(path=path, out=out, **_others()) for word in line.split()]
        _command_line().main(words, standalone_mode=False)

    return call


@cache
def _others() -> dict[str, Path]:
    """A healthy run and a healthy model, to be held against."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"other": write_run(folder / "other", *SEEDS[0]), "model": write_model(folder / "model")}


@cache
def _command_line() -> Any:
    import typer

    from msplora_analysis.cli import app

    return typer.main.get_command(app)  # typer makes it anew with every call of the app


def _measured(path: Path, out: Path, rng: random.Random) -> None:
    """What ``msplora-measure`` reads of an earlier measurement, and of moments."""
    from msplora_core.measure.ablation_folder import _known
    from msplora_core.moments import read_moments

    run = path if path.is_dir() else path.parent
    _known(run / "ablation.npz", MEASUREMENT, 2, str)
    for file in run.rglob("moments.safetensors"):
        read_moments(file, scores=("plain", "task"))


def _resume(path: Path, out: Path, rng: random.Random) -> None:
    """What ``--resume`` reads before it trains."""
    from msplora_core.run import checkpoints, record

    run = path if path.is_dir() else path.parent
    if (run / "run.json").is_file():
        record.read(run)
    checkpoints.newest_whole(run)


def _load_rows(path: Path, out: Path, rng: random.Random) -> None:
    from msplora_core.data.loading import load_splits
    from msplora_core.data.tasks import get_task

    load_splits(get_task("cola"), path if path.is_dir() else path.parent)["train"].fingerprint  # noqa: B018


def _load(path: Path, out: Path, rng: random.Random) -> None:
    from msplora_analysis import load_tables

    tables = load_tables(path, ignore_unknown=rng.random() < 0.5, cache=bool(os.environ["MSPLORA_CACHE"]))
    assert np.isfinite(tables.spectra["sigma"]).all(), "not finite"


_MOMENTS = "compress {path}/checkpoint-7 --out {out}/small --kl 0.5 --weights moments"
COMMANDS: dict[str, tuple[Command, float]] = {
    "load": (_load, 15),
    "spectra": (_command("spectra {path} --out {out} --format csv --workers 1 --ignore-unknown"), 7),
    "diagnose": (_command("diagnose {path} --workers 1 --json"), 60),
    "redundancy": (_command("redundancy {path} --out {out} --workers 1 --details"), 17),
    "results": (_command("results {path} --out {out}"), 14),
    "watch": (_command("watch {path} --once --no-cache"), 43),
    "export": (_command("export {path} --out {out}/adapter"), 6),
    "export mlx": (_command("export {path} --out {out}/adapter --to mlx"), 4),
    "compress": (_command("compress {path} --out {out}/small --rank 1"), 7),
    "compress moments": (_command(_MOMENTS), 28),
    "advise": (_command("advise {path} --out {out}"), 21),
    "check": (_command("check {path} --sarif {out}/check.sarif"), 5),
    "share": (_command("share {path} --out {out}/shared"), 136),
    "relate": (_command("relate {path} {other} --out {out} --format csv"), 17),
    "merge": (_command("merge {path} {other} --out {out}/merged"), 10),
    "extract": (_command("extract {path} --base {model} --out {out}/extracted --rank 1"), 10),
    "measure": (_measured, 3),
    "report": (_command("report {path} --out {out}/report.html --workers 1"), 110),
    "compare": (_command("compare {path} --with {path} --out {out}"), 70),
    "figures": (_command("figures {path} --out {out} --workers 1 --format svg"), 900),
    "base": (_command("spectra {path} --base {path} --out {out} --workers 1"), 10),
    "resume": (_resume, 2),
    "rows": (_load_rows, 2),
}
"""Each with the milliseconds that a mutation takes in it, about."""
CHEAP = tuple(name for name, (_, cost) in COMMANDS.items() if cost < 100)
