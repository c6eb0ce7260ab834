"""The tables of ``redundancy`` for chosen checkpoints alone: all of a long training would take long and say little."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from msplora_analysis.files import Adapter, discover

if TYPE_CHECKING:
    import pandas as pd


def redundancy_of(adapters: Sequence[Adapter], **how: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables pairs and scales, with details, of at most one adapter per run; ``how``: see ``load_redundancy``.

    Says nothing of what a reader must know of the adapters: that was said when their spectra were read.
    """
    from msplora_analysis.redundancy import load_redundancy

    of_file = {str(adapter.file): adapter for adapter in adapters}
    # A file given alone may have another name for its run, and no step or epoch.
    owners = {alone.run: of_file[str(alone.file)] for alone in discover(list(of_file))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = load_redundancy(list(of_file), details=True, **how)
    pairs, scales = (table.assign(run=table["run"].map({run: a.run for run, a in owners.items()})) for table in tables)
    return pairs, scales
