"""One training at a time writes to a run folder.

The lock is the operating system's, on a file in the folder, so that it ends with its process, however that ends: the
file that a killed run leaves locks nothing. What is written in it only tells who holds it.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from msplora_core.errors import TrainingError
from msplora_core.names import LOCK

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_PATIENCE = 0.5  # seconds: somebody may only be looking whether the folder is free


@contextmanager
def held(folder: Path) -> Iterator[str | None]:
    """Hold a run folder, which must be there, as long as the context lasts.

    Yields:
        What the user should know where the file system has no locks, else None.

    Raises:
        TrainingError: another process holds it; the message names it.
        OSError: the folder cannot be written to.
    """
    path = folder / LOCK
    descriptor, note = _locked(path, time.monotonic() + _PATIENCE)
    try:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        with suppress(OSError):  # a full disk is told of when there is something to lose
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
        yield note
    finally:
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                path.unlink()
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """Raise TrainingError if another process holds a run folder."""
    if (folder / LOCK).exists():
        descriptor, _ = _locked(folder / LOCK, 0)
        os.close(descriptor)


def _locked(path: Path, until: float) -> tuple[int, str | None]:
    """The lock's file, open and locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor, None
        except FileNotFoundError:  # removed by who had it, just now
            pass
        except BlockingIOError:
            if time.monotonic() > until:
                about = _about(descriptor)
                os.close(descriptor)
                raise TrainingError(
                    f"{path.parent}: another training writes to it ({about}); wait for it or end it, or give another "
                    "'output_dir'"
                ) from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            return descriptor, f"{path.parent}: its file system has no locks; see to it that no other run writes there"
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        raise OSError(errno.ENOSYS, "no flock") from None
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _about(descriptor: int) -> str:
    """Who holds a lock, as far as its file tells."""
    try:
        about = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {about['pid']:d} on {str(about['host'])[:99]}, since {str(about['since'])[:99]}"
    except (ValueError, TypeError, KeyError):  # it has just taken it
        return "which one is not known yet"
