"""How every figure looks: fonts, colours, and the settings that make files identical from run to run."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

import matplotlib.style as mpl_style
import pandas as pd

from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.venues import DEFAULT, Style, style_of

Dash = str | tuple[float, tuple[float, ...]]

DASHES: tuple[Dash, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
"""Line styles, so that lines stay apart in greyscale. 4 and the 7 colours share no factor: 28 combinations."""

SETTINGS: dict[str, Any] = {
    # The fonts that matplotlib brings along: the same look on every machine.
    "font.family": ["DejaVu Sans"],
    "mathtext.fontset": "dejavusans",
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
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.minor.size": 1.2,
    "ytick.minor.size": 1.2,
    "lines.linewidth": 1.2,
    "hatch.linewidth": 0.4,
    "hatch.color": "0.75",
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType, as publishers ask, rather than Type 3
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "msplora",  # element ids that do not change from run to run
}

# Times as matplotlib has it, smaller to the eye than DejaVu Sans; letters that it lacks come from the latter.
SERIF: dict[str, Any] = {
    "font.family": ["STIXGeneral", "DejaVu Sans"],
    "mathtext.fontset": "stix",
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.titlesize": 8.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
}

SMALLEST = 6.0
"""Points; no text is smaller, at the width of the style."""


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under the settings of a style, and leave the caller's own as they were.

    `draw(numbers, style, ...)` takes a `Style`; the function returned takes its name, or None for the default one.
    """

    @wraps(draw)
    def wrapper(numbers: pd.DataFrame, style: str | None = None, **options: Any) -> Figure:
        chosen = style_of(style)
        with settings(chosen):
            return draw(numbers, chosen, **options)

    return wrapper


def settings(style: Style = DEFAULT) -> AbstractContextManager[None]:
    """matplotlib's defaults (not the user's matplotlibrc) with ours over them, for the length of a `with`."""
    return mpl_style.context(["default", SETTINGS, SERIF if style.serif else {}])


@contextmanager
def lean_fonts() -> Iterator[None]:
    """Fonts in files without tables that place letters: no file needs them, and cutting them takes most of the time."""
    from fontTools.subset import Options

    name = "_drop_tables_default"  # fontTools' own; one without it only takes longer
    before = getattr(Options, name, [])
    setattr(Options, name, [*before, "GDEF", "GPOS", "GSUB"])
    try:
        yield
    finally:
        setattr(Options, name, before)
