"""What ``export`` and ``compress`` share: one adapter is read, another is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

AdapterPath = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="Adapter folder or file, or a folder with one adapter; local, hf://owner/name, or any fsspec address.",
        show_default=False,
    ),
]

Folder = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder of the new adapter; it is made.", show_default=False)
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is in DIR.")]


def by_module(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each module type, and of all if there are several."""
    groups = [(str(name), rows) for name, rows in table.groupby("module", sort=False)]
    return groups if len(groups) == 1 else [*groups, ("all", table)]


def span(values: pd.Series[int]) -> str:
    """ "8", or "2-8" for values that differ."""
    low, high = values.min(), values.max()
    return str(low) if low == high else f"{low}-{high}"
