"""Waiting for a key without echo, and leaving the terminal as it was."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Wait = Callable[[float], bool]  # waits so many seconds at most; whether q was pressed


@contextmanager
def quit_key() -> Iterator[Wait]:
    """A function that waits and tells whether the user wants to leave; without a keyboard it only waits."""
    if not sys.stdin.isatty():
        yield _only_wait
        return
    try:
        import termios
        import tty
    except ImportError:  # Windows
        yield _wait_windows
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield lambda seconds: _wait_posix(descriptor, seconds)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _only_wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _wait_posix(descriptor: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
        keys = os.read(descriptor, 1024)
        if not keys or b"q" in keys.lower():  # nothing to read: the terminal is gone
            return True
    return False


def _wait_windows(seconds: float) -> bool:
    import msvcrt

    until = time.monotonic() + seconds
    while True:
        while msvcrt.kbhit():  # type: ignore[attr-defined,unused-ignore]
            if msvcrt.getwch() in "qQ":  # type: ignore[attr-defined,unused-ignore]
                return True
        if (left := until - time.monotonic()) <= 0:
            return False
        time.sleep(min(0.05, left))
