"""Figures that Jupyter shows, by their own methods: nothing of Jupyter or matplotlib is changed."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from io import BytesIO
from typing import Any

import matplotlib.figure
from matplotlib.backends.backend_agg import FigureCanvasAgg

from msplora_analysis.errors import printable


class Figure(matplotlib.figure.Figure):
    """A matplotlib Figure that Jupyter shows without ``%matplotlib inline``; what that sets comes first.

    Attributes:
        placed: Whether its panels have their places already.
    """

    placed = False

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        FigureCanvasAgg(self)  # one renderer as long as the size stays, which knows the texts that it has measured

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """Twice as many pixels as it is wide on the page."""
        png = BytesIO()
        self.savefig(png, format="png", dpi=2 * self.dpi)
        width, height = (round(inches * self.dpi) for inches in self.get_size_inches())
        return png.getvalue(), {"width": width, "height": height}


class Figures(dict[str, Figure]):
    """Name -> figure, as ``draw_figures`` gives them; Jupyter shows all, each below its name.

    A kind of figure stands for its only one: ``figures["rank_needed"]`` for ``figures["rank_needed: LoRA r=8"]``.
    """

    def __missing__(self, kind: str) -> Figure:
        of_kind = [name for name in self if name.startswith(f"{kind}: ")]
        if len(of_kind) != 1:
            raise KeyError(f"{kind!r}: choose from {', '.join(of_kind or self)}")
        return self[of_kind[0]]

    def _repr_html_(self) -> str:
        shown = []
        for name, figure in self.items():
            png, size = figure._repr_png_()
            data = b64encode(png).decode()
            shown.append(f"<p><b>{escape(printable(name))}</b></p>")
            shown.append(f'<img width="{size["width"]}" src="data:image/png;base64,{data}">')
        return "".join(shown)
