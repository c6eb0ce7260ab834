"""How far predictions of the KL were off in docs/calibration.md (figures/calibration/ratios_by_cut.csv)."""

LARGEST = 0.05
"""Nats an example above which a prediction tells the size alone."""
OF_RANKS = (0.71, 1.34)
"""Measured over predicted KL, the middle 80 % on both models: every module cut to one rank, by either spectrum."""
OF_MODULES = (0.80, 3.72)
"""The same, one module left out: MiniLM makes it so wide; on SmolLM2 it is 0.80 to 1.60."""


def in_words(predicted: float, *, leaves_out: bool, regression: bool) -> str:
    """What to expect beside a predicted KL, in nats an example.

    Args:
        predicted: From the gates of the moments.
        leaves_out: Whether the cut leaves out whole modules.
        regression: Whether the task is one: its outputs have no unit, and nothing was calibrated in theirs.

    Example:
        >>> in_words(0.001, leaves_out=False, regression=False)
        'in the calibration, cuts to one rank cost 0.71 to 1.34 times the predicted KL (the middle 80 %)'
    """
    if regression:
        return "of a regression: half the mean squared change of its output; how far that is off was not calibrated"
    if predicted > LARGEST:
        return f"a prediction above {LARGEST:g} tells the size alone; msplora-measure ablate measures it"
    low, high = OF_MODULES if leaves_out else OF_RANKS
    what = "leaving out a module cost" if leaves_out else "cuts to one rank cost"
    return f"in the calibration, {what} {low:g} to {high:g} times the predicted KL (the middle 80 %)"
