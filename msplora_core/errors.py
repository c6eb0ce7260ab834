"""The error that bad input raises."""


class TrainingError(ValueError):
    """What the user gave cannot be used. The message is one line: what, where, expected, what to do."""
