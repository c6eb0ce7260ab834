"""The one exception of the package that a user is meant to see."""

from __future__ import annotations

from msplora_core.names import printable

__all__ = ["AnalysisError", "ChangedError", "NotFiniteError", "enter", "printable"]

_LONGEST = 1500  # characters of a message


class AnalysisError(ValueError):
    """Bad input: a file, tensor, table or option that cannot be used as given.

    The message is one line: what is wrong (file, tensor or argument), what was expected and what to
    do. Names taken from a file may hold anything; they are made ``printable``, and cut if endless.

    An argument is written ``name=`` or ``name=value``, and named again behind the message: the command
    line then says its option, ``--name value``.

        raise AnalysisError(f"dtype={dtype}: expected float32 or float16", "dtype")
        raise AnalysisError(f"{path}: unknown tensors: x; pass ignore_unknown=True to leave them out", "ignore_unknown")
    """

    def __init__(self, message: str, *arguments: str) -> None:
        self.arguments = arguments
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} [...] {message[-_LONGEST // 2 :]}"
        super().__init__(printable(message))


class NotFiniteError(AnalysisError):
    """An adapter that holds NaN or Inf, or whose singular values exceed float64: its training diverged."""


class ChangedError(AnalysisError):
    """A file that changed while it was read: what was read may be of the old content and of the new."""


def enter(error: AnalysisError, failed: list[AnalysisError] | None) -> None:
    """Enter an error in the list that a caller gave for those, to go on without what failed; raise it without one."""
    if failed is None:
        raise error
    failed.append(error)
