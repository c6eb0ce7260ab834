"""The rows of a table, one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Each row as a dictionary of its columns, whose names are texts in our tables."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
