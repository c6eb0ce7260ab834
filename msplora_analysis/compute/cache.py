"""Results of earlier calls, so that a second call on a growing run reads only what is new.

One SQLite file for all runs of a user. A result is found again as long as every file that it comes from is the same:
its path, device, inode, size, and times of modification and change; and the adapter's config, the options and the
version of this package. Reading the data to compare it would cost as much as computing. A result is kept only under the
states that its files had when they were opened for it; the work itself fails if they changed before its end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.moments import moments_file
from msplora_analysis.compute.results import Row, Spectra
from msplora_analysis.files.opening import is_of_several
from msplora_analysis.files.tensors import State, state_of
from msplora_analysis.options import Options
from msplora_core import records
from msplora_core.version import __version__

DIRECTORY_VARIABLE = "MSPLORA_CACHE"  # a folder; empty: no cache

_VERSION = 2  # of what is stored and how it is computed: raise it when either changes
_KEPT = 90 * 86_400  # seconds after which an entry that nobody asked for is dropped
_SETTLED = 2.0  # seconds: a file changed more recently may change again within one tick of its clock
_MOST_BYTES = 2**28  # of the text of an entry; a compressed one may unpack to any size
_STORED: records.Schema = {"rows": [[object]], "lengths": [int], "unknown": [str], "notes": [object]}
_ROW: tuple[records.Schema, ...] = (str, (int, None), str, str, int, int, int, (float, None))  # the fields of Row


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
        return _opened(folder / f"spectra-{_VERSION}.sqlite")
    except (OSError, sqlite3.Error):  # a read-only home, say: everything works without a cache
        return None


def _opened(path: Path) -> Cache:
    """The cache at ``path``; one that a power cut has damaged is made anew."""
    try:
        return Cache(path)
    except sqlite3.OperationalError:  # locked, or no room
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError):  # its own message may quote the damaged bytes
        for end in ("", "-wal", "-shm"):
            Path(f"{path}{end}").unlink(missing_ok=True)
        return Cache(path)


class Cache:
    """Spectra by adapter file. A cache that cannot be read or written is as good as an empty one."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, timeout=10, isolation_level=None)
        self._is_writable = True
        # A torn cache after a power cut is no loss, and its digests tell; waiting for the disk would be one.
        for statement in (
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE IF NOT EXISTS spectra "
            "(key BLOB PRIMARY KEY, used INTEGER, digest BLOB, rows BLOB, sigma BLOB)",
        ):
            self._database.execute(statement)
        self._database.execute("DELETE FROM spectra WHERE used < ?", (int(time.time()) - _KEPT,))

    def get(self, adapter: Adapter, options: Options) -> Spectra | None:
        """The result for this very file, if it is known."""
        identity = _identity(adapter, options)
        if identity is None:
            return None
        try:
            key = _key(identity, adapter, options)
            asked = "SELECT rows, sigma, used, digest FROM spectra WHERE key = ?"
            found = self._database.execute(asked, (key,)).fetchone()
            if found is None or found[3] != _digest(key, *found[:2]):
                return None
            stored = records.parse(_unpacked(found[0]))
            records.check(stored, _STORED)
            rows = [Row(*row) for row in stored["rows"]]
            values = np.frombuffer(found[1], dtype="<f8")
            lengths = stored["lengths"]
            if not _make_sense(rows, lengths, values) or not all(isinstance(note, str) for note in stored["notes"]):
                return None
            ends = np.cumsum(lengths)
            if abs(time.time() - found[2]) > _KEPT / 10:
                self._write("UPDATE spectra SET used = ? WHERE key = ?", int(time.time()), key)
        except (sqlite3.Error, ValueError, TypeError, zlib.error):  # or a configuration that cannot be read
            return None
        spectra = np.split(values, ends[:-1])
        sigma, task = spectra[: len(rows)], spectra[len(rows) :]
        return Spectra(adapter, rows, sigma, stored["unknown"], stored["notes"], task=task)

    def put(self, adapter: Adapter, options: Options, spectra: Spectra) -> None:
        """Keep a result, unless a file of it is no longer what was read, or so fresh that a change might go unseen."""
        identity = _identity(adapter, options)
        if identity is None or not spectra.built_in or not spectra.files:
            return
        if not spectra.files <= {state for _, state in identity}:
            return
        if spectra.rows and not spectra.task and moments_file(adapter, options):  # they came after it was read
            return
        key = _key(identity, adapter, options)
        stored = {
            "rows": spectra.rows,
            "lengths": [len(values) for values in (*spectra.sigma, *spectra.task)],
            "unknown": list(spectra.unknown),
            "notes": list(spectra.notes),
        }
        rows = zlib.compress(json.dumps(stored).encode(), 1)
        sigma = np.concatenate([np.empty(0), *spectra.sigma, *spectra.task]).astype("<f8").tobytes()
        digest = _digest(key, rows, sigma)
        self._write("INSERT OR REPLACE INTO spectra VALUES (?, ?, ?, ?, ?)", key, int(time.time()), digest, rows, sigma)

    def _write(self, statement: str, *values: object) -> None:
        if self._is_writable:
            try:
                self._database.execute(statement, values)
            except (sqlite3.Error, UnicodeDecodeError):  # locked for long, or no room: not to be waited for again
                self._is_writable = False

    def close(self) -> None:
        self._database.close()


def _unpacked(compressed: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(compressed, _MOST_BYTES)
    if not unpacker.eof:
        raise ValueError("larger than any entry is, or cut off")
    return text


def _make_sense(rows: Sequence[Row], lengths: Sequence[int], values: NDArray[np.float64]) -> bool:
    """Whether rows and values can be what was kept: an entry is a stranger's as any file is."""
    if len(lengths) not in (len(rows), 2 * len(rows)) or min(lengths, default=0) < 0 or sum(lengths) != len(values):
        return False
    for row, length in zip(rows, lengths, strict=False):
        if not all(map(records.fits, row, _ROW)) or length > min(row.rows, row.cols):
            return False
        if row.frobenius is not None and not math.isfinite(row.frobenius):
            return False
    return bool(np.isfinite(values).all() and (values >= 0).all())


Identity = list[tuple[str, State]]  # real path and state of every file that decides a result


def _identity(adapter: Adapter, options: Options) -> Identity | None:
    """What the files are now; None if one is remote, or may still change unseen."""
    try:
        identity = [(os.path.realpath(path), state_of(path)) for path in _files(adapter, options)]
    except OSError:
        return None
    settled = max(state[-1] for _, state in identity) <= (time.time() - _SETTLED) * 1e9
    return identity if settled else None


def _files(adapter: Adapter, options: Options) -> Iterator[Path]:
    """Every file that the result comes from; of a model in several files, all in its folder."""
    for place in (adapter.file, options.base, moments_file(adapter, options)):
        if place is not None:
            path = Path(place)  # an address is no file: looking at it fails, and there is no identity
            yield path
            if path.is_dir() or is_of_several(path):
                folder = path if path.is_dir() else path.parent
                yield from sorted(file for file in folder.iterdir() if file.is_file())


def _key(identity: Identity, adapter: Adapter, options: Options) -> bytes:
    """A digest of what decides the result; the file of moments is one of the identity."""
    text = json.dumps(
        [__version__, identity, adapter.config, repr(replace(options, moments=None))], sort_keys=True, default=str
    )
    return _digest(text.encode(errors="surrogatepass"))


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()
