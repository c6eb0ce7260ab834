"""Results of earlier calls, so that a second call on a growing run reads only what is new.

One SQLite file for all runs of a user. A result is found again as long as the adapter's file is the
same: its path, inode, size, and times of modification and change; and its config, the options and
the version of this package. Reading the data to compare it would cost as much as computing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.compute.results import Row, Spectra
from msplora_analysis.files.opening import INDEX_SUFFIX
from msplora_analysis.options import Options

DIRECTORY_VARIABLE = "MSPLORA_CACHE"  # a folder; empty: no cache

_VERSION = 1  # of what is stored and how it is computed: raise it when either changes
_KEPT = 90 * 86_400  # seconds after which an entry that nobody asked for is dropped
_SETTLED = 2.0  # seconds: a file changed more recently may change again within one tick of its clock


def open_cache() -> Cache | None:
    """The user's cache: $MSPLORA_CACHE, or msplora in the folder for caches; None if it cannot be used."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    if chosen == "":
        return None
    if chosen is None:
        home = Path("~/Library/Caches") if sys.platform == "darwin" else Path("~/.cache")
        folder = Path(os.environ.get("XDG_CACHE_HOME") or home.expanduser()) / "msplora"
    else:
        folder = Path(chosen)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Cache(folder / f"spectra-{_VERSION}.sqlite")
    except (OSError, sqlite3.Error):  # a read-only home, say: everything works without a cache
        return None


class Cache:
    """Spectra by adapter file. A cache that cannot be read or written is as good as an empty one."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, timeout=10, isolation_level=None)
        # A torn cache after a power cut is no loss; waiting for the disk would be.
        for statement in (
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE IF NOT EXISTS spectra (key BLOB PRIMARY KEY, used INTEGER, rows BLOB, sigma BLOB)",
        ):
            self._database.execute(statement)
        self._database.execute("DELETE FROM spectra WHERE used < ?", (int(time.time()) - _KEPT,))

    def get(self, adapter: Adapter, options: Options) -> Spectra | None:
        """The result for this very file, if it is known."""
        key = _key(adapter, options)
        if key is None:
            return None
        try:
            found = self._database.execute("SELECT rows, sigma, used FROM spectra WHERE key = ?", (key,)).fetchone()
            if found is None:
                return None
            stored = json.loads(zlib.decompress(found[0]))
            rows = [Row(*row) for row in stored["rows"]]
            values = np.frombuffer(found[1], dtype="<f8")
            ends = np.cumsum(stored["lengths"])
            if len(rows) != len(ends) or (len(ends) and ends[-1] != len(values)):
                return None
            if found[2] < time.time() - _KEPT / 10:
                self._database.execute("UPDATE spectra SET used = ? WHERE key = ?", (int(time.time()), key))
        except (sqlite3.Error, ValueError, KeyError, TypeError, zlib.error):
            return None
        return Spectra(adapter, rows, np.split(values, ends[:-1]), stored["unknown"], stored["notes"])

    def put(self, adapter: Adapter, options: Options, spectra: Spectra) -> None:
        """Keep a result, unless the file is so fresh that a change of it might go unseen."""
        key = _key(adapter, options)
        if key is None:
            return
        stored = {
            "rows": spectra.rows,
            "lengths": [len(values) for values in spectra.sigma],
            "unknown": list(spectra.unknown),
            "notes": list(spectra.notes),
        }
        sigma = np.concatenate([np.empty(0), *spectra.sigma]).astype("<f8").tobytes()
        try:
            self._database.execute(
                "INSERT OR REPLACE INTO spectra VALUES (?, ?, ?, ?)",
                (key, int(time.time()), zlib.compress(json.dumps(stored).encode(), 1), sigma),
            )
        except sqlite3.Error:
            return

    def close(self) -> None:
        self._database.close()


def _key(adapter: Adapter, options: Options) -> bytes | None:
    """A digest of what decides the result; None for a file that may still change unseen."""
    try:
        identity = [_identity(path) for path in _files(adapter, options)]
    except OSError:
        return None
    if max(changed for *_, changed in identity) > (time.time() - _SETTLED) * 1e9:
        return None
    text = json.dumps([identity, adapter.config, repr(options)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _files(adapter: Adapter, options: Options) -> Iterator[Path]:
    """Every file that the result comes from; of a model in several files, all in its folder."""
    for place in (adapter.file, options.base):
        if place is not None:
            path = Path(place)  # an address is no file: looking at it fails, and there is no key
            yield path
            if path.is_dir() or path.name.endswith(INDEX_SUFFIX):
                folder = path if path.is_dir() else path.parent
                yield from sorted(file for file in folder.iterdir() if file.is_file())


def _identity(path: Path) -> tuple[str, int, int, int, int]:
    status = os.stat(path)
    return os.path.realpath(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
