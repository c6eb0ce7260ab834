"""What adding one adapter costs the task of another, as ``msplora-measure added`` predicted it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place
from msplora_core.added import ADDED, Added, read_added, same
from msplora_core.errors import TrainingError

if TYPE_CHECKING:
    import pandas as pd

SIDES = (("a", "b"), ("b", "a"))
"""Whose task, and which adapter is added to it."""


def added_beside(adapter: Adapter) -> Added | None:
    """The file beside an adapter, if there is one; beside remote adapters none is looked for.

    Raises:
        AnalysisError: it is broken.
    """
    path = adapter.file.parent / ADDED
    if not isinstance(path, Path) or not path.is_file():
        return None
    try:
        return read_added(path)
    except (TrainingError, OSError) as error:
        raise AnalysisError(str(error)) from None


def predicted(
    table: pd.DataFrame, files: Mapping[str, tuple[Place, Added]], names: Mapping[str, Mapping[str, str]]
) -> dict[str, np.ndarray]:
    """The columns ``predicted_kl_a`` and ``predicted_kl_b``: NaN where nothing was measured.

    Args:
        table: Of ``relate``; its row of two in all has an empty name.
        files: Of the adapters that have one, by label.
        names: Of each of these adapters what it calls a module, by the name in the table.

    Raises:
        AnalysisError: a file is that of another adapter.
    """
    found = {f"predicted_kl_{side}": np.full(len(table), np.nan) for side, _ in SIDES}
    for side, other in SIDES:
        for (label, _), rows in table[table[side].isin(list(files))].groupby([side, other], sort=False):
            path, added = files[str(label)]
            own = [names[str(label)].get(name, "") for name in rows["name"]]
            norms: list[dict[str, float]] = [
                {name: norm for name, norm in zip(own, rows[f"norm_{of}"], strict=True) if name} for of in (side, other)
            ]
            if not same(norms[0], added.norms):
                raise AnalysisError(
                    f"{path}: not of the values in the adapter beside it (another checkpoint?); measure it anew with "
                    "msplora-measure added, or take the file away"
                )
            if beside := added.of(norms[1]):
                costs: dict[str, Any] = {**beside.modules, "": beside.predicted_kl}
                found[f"predicted_kl_{side}"][rows.index] = [costs[name] for name in own]
    return found
