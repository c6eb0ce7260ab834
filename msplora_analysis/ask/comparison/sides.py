"""The two sides of a comparison, from runs on disk or from tables."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.ask.comparison.compare import Side
from msplora_analysis.ask.comparison.pairing import units
from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Execution, Options
from msplora_analysis.tables.checkpoints import adapters_at
from msplora_analysis.tables.files import read_spectra
from msplora_analysis.tables.gather import stored_pairs, table_at
from msplora_analysis.tables.load import read_tables
from msplora_analysis.tables.matrices import method_labels, prepare
from msplora_analysis.tables.nulls import read_run, same_layer
from msplora_analysis.tables.pairs import redundancy_of


def load_sides(
    a: Sequence[StrPath],
    b: Sequence[StrPath],
    method_a: str | None,
    method_b: str | None,
    options: Options,
    execution: Execution,
    *,
    epoch: float | None = None,
) -> tuple[Side, Side]:
    """Both sides from paths: each either of adapters, or of one spectra table.

    Layers' subspaces are compared for adapters, with the same number of directions on both sides; for a table if a
    pairs table lies beside it. ``method_a`` and ``method_b``: see ``side_of``.
    """
    loaded = [_load(paths, method, options, execution) for paths, method in ((a, method_a), (b, method_b))]
    top_k = min(_rank(side.spectra) for side, _ in loaded)
    reading, quietly = replace(options, top_k=top_k), replace(execution, progress=None)
    sides = []
    for side, adapters in loaded:
        if adapters:
            pairs, _ = redundancy_of(adapters_at(adapters, epoch), reading, quietly, details=True, say=False)
            side = replace(side, pairs=pairs, same_layer=_same_layer(side, adapters_at(adapters, epoch), reading))
        sides.append(side)
    if (sides[0].pairs is None) != (sides[1].pairs is None):
        warnings.warn("subspaces are not compared: one of the two is a table without a pairs table", stacklevel=2)
    called_a, called_b = (printable(Path(paths[0]).name or str(paths[0])) for paths in (a, b))
    return told_apart(sides[0], sides[1], called_a, called_b)


def side_of(
    spectra: pd.DataFrame,
    method: str | None,
    source: str,
    *,
    pairs: pd.DataFrame | None = None,
    adapters: Sequence[Adapter] = (),
) -> Side:
    """The runs of one method in a spectra table.

    Args:
        method: As figures call it, such as "LoRA r=8"; None: the only one there is.
        source: What the table is called in errors.
        pairs: The table of ``load_pairs``.
        adapters: What the table was read from: run.json above them tells tasks and seeds.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again when they are compared
        matrices = prepare(spectra)
    names = method_labels(matrices)
    if method is None and len(names) > 1:
        raise AnalysisError(
            f"{source}: holds several methods; choose one with method_a or method_b (--method or --with-method): "
            f"{', '.join(names)}"
        )
    if method is not None and method not in names:
        raise AnalysisError(f"{source}: holds no runs of {method!r}; there are {', '.join(names)}")
    label = method or names[0]
    runs = matrices.loc[matrices["variant"] == label, "run"].unique()
    return Side(label, spectra[spectra["run"].isin(runs)], pairs, units(runs, adapters))


def told_apart(a: Side, b: Side, called_a: str, called_b: str) -> tuple[Side, Side]:
    """Both, with what they are called after a label that both have."""
    if a.label != b.label:
        return a, b
    if called_a == called_b:
        called_a, called_b = "a", "b"
    return replace(a, label=f"{a.label} ({called_a})"), replace(b, label=f"{b.label} ({called_b})")


def _load(
    paths: Sequence[StrPath], method: str | None, options: Options, execution: Execution
) -> tuple[Side, list[Adapter]]:
    """A side, with its stored pairs if it is a table, or its adapters."""
    tables = [file for path in paths if (file := table_at(path)) is not None]
    if tables and len(paths) > 1:
        raise AnalysisError(f"{tables[0]}: a table cannot be joined with other paths; give it alone, or give the runs")
    if tables:
        pairs = stored_pairs(tables[0], "pairs")
        return side_of(read_spectra(tables[0]), method, str(paths[0]), pairs=pairs), []
    adapters = discover(paths, full=options.base is not None)
    spectra = read_tables(paths, options, execution).spectra
    side = side_of(spectra, method, str(paths[0]), adapters=adapters)
    runs = set(side.spectra["run"])
    return side, [adapter for adapter in adapters if adapter.run in runs]


def _same_layer(side: Side, adapters: Sequence[Adapter], options: Options) -> dict[str, float]:
    """Overlap less chance of one layer in two runs of a task, mean over tasks; empty where that is not known."""
    task_of = {unit.run: unit.task for unit in side.units or ()}
    found: dict[str, list[float]] = {}
    for task in dict.fromkeys(task_of.values()):
        members = [adapter for adapter in adapters if task_of.get(adapter.run) == task]
        try:
            runs = [read_run(adapter, None, options) for adapter in members] if len(members) > 1 else []
        except AnalysisError:  # an update that is no product of factors
            return {}
        for name, value in same_layer(runs, options.top_k).items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _rank(spectra: pd.DataFrame) -> int:
    """The least rank of a layer's own factors."""
    parts = spectra[spectra["scale"] == "layer"]
    return int(parts.groupby(["run", "step", "name"], dropna=False)["k"].max().min()) if len(parts) else 1
