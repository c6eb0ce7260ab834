"""What stands in a folder: links, data, the cache."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import numpy as np

from fuzz.values import mutate_bytes, mutated_text


def spoil_links(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Links that lead in a circle, deep folders, and files of other kinds where one is expected."""
    for _ in range(rng.randint(1, 3)):
        at = rng.choice([run, run / "checkpoint-7", run.parent])
        name = rng.choice(
            ["a", "checkpoint-8", "run.json", "adapter_config.json", "=x", "\x1b[1m", "é", "a\udcff", "$x$"]
        )
        kind = rng.randrange(5)
        try:
            if kind == 0:
                (at / name).symlink_to(
                    rng.choice([".", "..", "/dev/zero", "nowhere", name, "checkpoint-7", "run.json"])
                )
            elif kind == 1:
                (at / Path(*["d"] * rng.choice([3, 100]))).mkdir(parents=True)
            elif kind == 2:
                os.mkfifo(at / name)
            elif kind == 3:
                shutil.copytree(run / "checkpoint-7", at / name, symlinks=True)  # /dev/zero has no end
            else:
                (run / "checkpoint-7").rename(run / f"checkpoint-{rng.choice(['x', '9' * 20, '0', name])}")
        except (OSError, RecursionError):
            continue
    return run


def spoil_rows(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The rows to train on."""
    rows = [{"sentence": f"a {i}", "label": i % 2} for i in range(4)]
    lines = [json.dumps(row).encode() for row in rows]
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines))
        try:
            lines[at] = mutated_text(rng, lines[at], ["sentence", "label"])
        except (ValueError, RecursionError):  # what was mutated before is no JSON any more
            lines[at] = mutate_bytes(rng, lines[at])
    (run / "cola_train.jsonl").write_bytes(b"\n".join(lines))
    (run / "cola_validation.jsonl").write_bytes(b"\n".join(lines))
    return run


def spoil_cache(rng: random.Random, root: Path, path: Path) -> None:
    """Fill the cache, and put other rows into it."""
    import sqlite3
    import zlib

    from msplora_analysis import AnalysisError, load_tables

    cache = root / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["MSPLORA_CACHE"] = str(cache)
    for file in path.rglob("*"):
        os.utime(file, (1e9, 1e9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_tables(path, ignore_unknown=True)
        except AnalysisError:
            return
    for file in cache.glob("*.sqlite"):
        if rng.random() < 0.2:
            file.write_bytes(mutate_bytes(rng, file.read_bytes()))
            continue
        with sqlite3.connect(file) as database:
            for key, rows, sigma in database.execute("SELECT key, rows, sigma FROM spectra").fetchall():
                text = mutated_text(rng, zlib.decompress(rows), [])
                new = zlib.compress(text) if rng.random() < 0.9 else mutate_bytes(rng, rows)
                values = sigma if rng.random() < 0.7 else mutate_bytes(rng, sigma)
                database.execute("UPDATE spectra SET rows = ?, sigma = ? WHERE key = ?", (new, values, key))
