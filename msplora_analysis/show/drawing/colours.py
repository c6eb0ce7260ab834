"""Colours of everything that is drawn, on paper and on a screen."""

from matplotlib.colors import ListedColormap

SEQUENTIAL = "viridis"
OVERLAPS = "plasma"
"""Another colour map than that of the other measures: overlaps and divergences are no one scale."""
DIVERGING = "RdBu_r"
"""All perceptually ordered and safe for colour-blind readers."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito 2008, without its yellow, which is too pale for lines on white."""

ON_SCREEN = (*PALETTE[:4], "#B58900", "#3A9BDC")
"""The same for a page that is light or dark: no black, and each at least 3:1 on both."""

NO_DATA = "0.88"
GREY = ListedColormap(["0.72"])
"""Of cells that differ by no more than chance."""
