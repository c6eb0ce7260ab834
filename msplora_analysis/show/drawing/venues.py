"""What venues ask of a figure: how wide it may be and which kind of letters it has."""

from dataclasses import dataclass

from msplora_analysis.errors import AnalysisError


@dataclass(frozen=True)
class Style:
    """The looks of a figure.

    widths: inches it may be wide, ascending; it takes the narrowest in which every layer can be labelled, else the
        last, and labels every 2nd, 4th, ... layer.
    serif: letters like Times, or else sans-serif.
    """

    widths: tuple[float, ...]
    serif: bool = True

    @property
    def widest(self) -> float:
        return self.widths[-1]


DEFAULT = Style((3.35, 5.0, 7.0), serif=False)
"""One column of a paper, one and a half, two; for the screen and for reports."""

# Width of a column and of the whole text in inches; equal where the text has one column.
# As in the package tueplots (the tests compare), but for acl (also EMNLP, NAACL): acl.sty, 16 cm of text and 0.6 cm
# between columns; acm: acmart's sigconf; ieee: the Author Center's size requirements for graphics.
VENUES = {
    "aaai": (3.3, 6.975),
    "acl": (3.03, 6.3),
    "acm": (3.337, 7.005),
    "aistats": (3.25, 6.75),
    "colm": (5.5, 5.5),
    "cvpr": (3.25, 6.875),
    "eccv": (4.8, 4.8),
    "iclr": (5.5, 5.5),
    "icml": (3.25, 6.75),
    "ieee": (3.5, 7.16),
    "jmlr": (6.0, 6.0),
    "neurips": (5.5, 5.5),
    "tmlr": (6.5, 6.5),
    "uai": (3.25, 6.75),
}


def style_of(name: str | None) -> Style:
    """'icml-column', 'icml-full': figures of just that width; 'icml': each as wide as it needs; None: `DEFAULT`.

    Where the text has one column, 'neurips' is three fifths of its width or all of it. Raises AnalysisError if there is
    no such style.
    """
    if name is None:
        return DEFAULT
    venue, _, width = name.lower().partition("-")
    if venue not in VENUES or width not in ("", "column", "full") or name.endswith("-"):
        raise AnalysisError(
            f"unknown style {name!r}: choose one of {', '.join(VENUES)}; for one width only add -column or -full"
        )
    column, full = VENUES[venue]
    if width:
        return Style((column if width == "column" else full,))
    return Style((column, (column + full) / 2, full) if column < full else (0.6 * full, full))
