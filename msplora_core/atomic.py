"""Write files so that a reader finds the old content or the new, never half of it. Both packages write with it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write to; at the end it takes its place.

    Args:
        path: The file to write or to replace.
        durable: Flush to the disk, so that the file survives a power cut too.

    Raises:
        OSError: the file cannot be written. What stood at ``path`` stays.

    Example:
        >>> with replacing(Path("run.json")) as beside:
        ...     beside.write_text("{}")
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        if durable:
            flush(beside)
        os.replace(beside, path)
        if durable:
            flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
