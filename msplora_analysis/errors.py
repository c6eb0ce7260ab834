"""The one exception of the package that a user is meant to see."""

from __future__ import annotations


class AnalysisError(ValueError):
    """Bad input: a file, tensor, table or option that cannot be used as given.

    The message is one line: what is wrong (file, tensor or option), what was expected and what to
    do. Names taken from a file may hold line breaks; they are written as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\\n".join(message.splitlines()))
