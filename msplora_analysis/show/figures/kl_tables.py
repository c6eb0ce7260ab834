"""The mean KL between layers, of each method and of each run: tables without a picture."""

from collections.abc import Iterator

import pandas as pd

from msplora_analysis.show.drawing.plot import Plot
from msplora_analysis.tables.layer_kl import per_run, summary


def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    """Both tables, if any stack has two layers to compare."""
    table = summary(matrices, epoch)
    if len(table):
        yield Plot("kl_summary", table)
        yield Plot("kl_per_run", per_run(matrices, epoch))
