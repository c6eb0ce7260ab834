"""How every figure looks: widths, fonts, colours, and the settings that make files identical from run to run."""

import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, ParamSpec

import matplotlib.style as mpl_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SINGLE, WIDE, DOUBLE = 3.35, 5.0, 7.0
"""Widths in inches: one column of a paper, one and a half, two."""

SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
"""Both perceptually ordered and safe for colour-blind readers."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito 2008, without its yellow, which is too pale for lines on white."""

DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
"""Line styles, so that lines stay apart in greyscale. 4 and the 7 colours share no factor: 28 combinations."""

NO_DATA = "0.88"

SETTINGS: dict[str, Any] = {
    # The sans-serif that matplotlib brings along: the same look on every machine, and it has σ, ‖ and −.
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "figure.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "hatch.linewidth": 0.4,
    "hatch.color": "0.75",
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType, as publishers ask, rather than Type 3
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "msplora",  # element ids that do not change from run to run
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under `SETTINGS` on top of matplotlib's defaults, and leave the caller's own settings as they were."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with settings():
            return draw(*args, **kwargs)

    return wrapper


def settings() -> AbstractContextManager[None]:
    """matplotlib's defaults (not the user's matplotlibrc) with `SETTINGS` over them, for the length of a `with`."""
    return mpl_style.context(["default", SETTINGS])


def title(figure: Figure, heading: str, *notes: str) -> None:
    """A short heading with what was averaged in brackets; on lines of their own where the figure is too narrow."""
    columns = int(figure.get_figwidth() * 14)
    note = ", ".join(filter(None, notes))
    lines = [f"{heading} ({note})" if note else heading]
    if len(lines[0]) > columns:
        lines = [line for part in (heading, note) for line in textwrap.wrap(part, columns)]
    figure.suptitle("\n".join(lines))


def label_epochs(ax: Axes) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))


def runs_note(counts: list[int]) -> str:
    """'1 run', 'mean over 9 runs', 'mean over 9 runs each', 'mean over 9 and 3 runs'."""
    each = " each" if len(counts) > 1 and len(set(counts)) == 1 else ""
    if max(counts) == 1:
        return f"1 run{each}"
    numbers = str(counts[0]) if each else " and ".join(str(count) for count in counts)
    return f"mean over {numbers} runs{each}"
