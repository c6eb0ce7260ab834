"""What the moments of adapters say of each module, as a table."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from msplora_analysis.adapters.discovery import as_paths, discover
from msplora_analysis.adapters.moments import moments_file
from msplora_analysis.ask.advice.cuts import predicted
from msplora_analysis.ask.advice.gather import moments_of, of_adapter
from msplora_analysis.ask.advice.subject import whole_updates
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Execution, Options
from msplora_analysis.tables.load import spectra_of, succeeding, tables_of

ABOUT = ("task", "loss", "labels", "examples", "tokens")
COLUMNS = (
    "run",
    "step",
    "epoch",
    "name",
    "rank",
    "task_norm",
    "task_effective_rank",
    "predicted_kl",
    "whole_kl",
    *ABOUT,
)


def load_moments(paths: StrPath | Iterable[StrPath], options: Options, execution: Execution) -> pd.DataFrame:
    """The table of ``ma.load_moments``.

    Args:
        paths: What ``discover`` takes.
        options: How the adapters are read; moments that were named belong to one adapter.
        execution: How the adapters are computed.

    Raises:
        AnalysisError: no adapter has moments, or a file of them is broken or fits another adapter.
    """
    given = as_paths(paths)
    adapters = [adapter for adapter in discover(given) if moments_file(adapter, options) is not None]
    if not adapters:
        raise AnalysisError(f"{given[0]}: no adapter there has moments; run msplora-measure moments {given[0]}")
    results = list(succeeding(spectra_of(adapters, options, execution)))
    _, metrics = tables_of(adapters, results, (1,), True)
    found = []
    for adapter in adapters:
        moments = moments_of(adapter, options)
        assert moments is not None
        rows = whole_updates(metrics[of_adapter(metrics, adapter)])
        rows = rows[rows["name"].isin(list(moments.modules))]
        scores = {name: of.scores["plain"].sum(axis=1, dtype="float64") for name, of in moments.modules.items()}
        rows = rows.assign(
            predicted_kl=[predicted(moments, [scores[name]]) for name in rows["name"]],
            whole_kl=predicted(moments, list(scores.values())),
            **{name: moments.about.get(name) for name in ABOUT},
        )
        found.append(rows[list(COLUMNS)])
    return pd.concat(found, ignore_index=True).astype({"examples": "Int64", "tokens": "Int64"})
