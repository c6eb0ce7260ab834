"""Standard output and error of a command, as both packages need them. Nothing heavy is imported."""

import io
import os
import sys


def make_writable() -> None:
    """Have nothing that a command prints fail: where a stream is closed, and where an encoding lacks a letter."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # whoever started this has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process lives
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
