"""Write files and folders so that a reader finds the old content or the new, never half of it. Both packages do.

What is written stands beside its place until it is whole, under a name that tells whose it is. A process that is killed
leaves it there; the next one that writes to the same folder removes it.
"""

import errno
import itertools
import os
import platform
import re
import shutil
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

# .NAME.PROCESS.MACHINE-NUMBER.tmp; version 0.1.0 had no MACHINE-NUMBER.
_LEFT = re.compile(r"\.(.+)\.(\d{1,9})(?:\.([0-9a-f]{8})-\d+)?\.(tmp|old)", re.DOTALL)
_SMALL = 2**20  # bytes: a disk with less to spare is full
_numbers = itertools.count()
_ours: set[Path] = set()  # what this process is writing, in all its threads
_sweeping = threading.Lock()


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write to; at the end it takes its place.

    Args:
        path: The file to write or to replace.
        durable: Flush to the disk, so that the file survives a power cut too.

    Raises:
        OSError: the file cannot be written; the error names it. What stood at ``path`` stays.

    Example:
        >>> with replacing(Path("run.json")) as beside:
        ...     beside.write_text("{}")
    """
    with _beside(path) as beside:
        yield beside
        if durable:
            flush(beside)
        os.replace(beside, path)
        if durable:
            flush(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to write to; at the end it takes its place, flushed to the disk.

    Raises:
        OSError: it cannot be written; the error names ``path``. What stood there stays.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as beside:
        beside.mkdir()
        yield beside
        flush_all(beside)
        if not path.exists():
            os.rename(beside, path)
        elif not _exchange(beside, path):
            before = beside.with_suffix(".old")
            os.rename(path, before)
            try:
                os.rename(beside, path)
            except OSError:
                os.rename(before, path)
                raise
            _remove(before)
        flush(path.parent)


def flush_all(folder: Path) -> None:
    """Make a folder with all that is in it survive a power cut, but for its name."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_written(error: Exception, path: Path) -> OSError | None:
    """What a library's exception says of writing to ``path``, as the system's error; None if it is of other things."""
    if isinstance(error, OSError):
        return OSError(error.errno, os.strerror(error.errno) if error.errno else str(error), str(path))
    text = " ".join(str(error).split())
    by_torch = isinstance(error, RuntimeError) and any(w in text for w in ("PytorchStreamWriter", "iostream error"))
    if type(error).__name__ != "SafetensorError" and not by_torch:
        return None
    near = next(folder for folder in (path, *path.parents) if folder.exists())
    if shutil.disk_usage(near).free < _SMALL:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return OSError(errno.EIO, text[:200], str(path))


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name of our own beside ``path``, that nothing has at the end; errors name ``path``."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{_machine()}-{next(_numbers)}.tmp")
    _ours.add(beside)
    try:
        remove_left(path)
        yield beside
    except Exception as error:
        told = not_written(error, path)
        named = getattr(error, "filename", None)
        if told is None or not (named is None or str(named).startswith(str(beside))):
            raise
        raise told from error
    finally:
        _remove(beside)
        _ours.discard(beside)


def remove_left(path: Path) -> None:
    """Remove what killed processes of this machine were writing in the folder of ``path``."""
    with _sweeping, suppress(OSError):
        for name in os.listdir(path.parent):
            match = _LEFT.fullmatch(name)
            left = path.with_name(name)
            if match is None or left in _ours:
                continue
            final, process, machine, kind = match.groups()
            # Of others nobody here can tell whether they live; what names no machine is only ours if it has our name.
            if machine != _machine() if machine else final != path.name:
                continue
            if int(process) != os.getpid() and _is_alive(int(process)):
                continue
            if kind == "old" and not (before := path.with_name(final)).exists():
                os.rename(left, before)  # killed while a folder took the place of this one
            else:
                _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@cache
def _machine() -> str:
    """Of this machine, or this container: numbers of processes mean something within it alone."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{zlib.crc32(f'{platform.node()} {space}'.encode()):08x}"


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places at once, so that both are there at any moment; False where the system cannot."""
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    at, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    return rename is not None and rename(at, os.fsencode(one), at, os.fsencode(other), exchange) == 0
