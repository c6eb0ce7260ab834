"""All methods in what was gathered, compared two by two."""

from __future__ import annotations

import warnings
from itertools import combinations
from typing import NamedTuple

import pandas as pd

from msplora_analysis.ask.comparison.compare import Side, compare
from msplora_analysis.ask.comparison.pairing import units
from msplora_analysis.ask.comparison.statements import sentences, verdict
from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.tables.matrices import is_msplora, method_labels

MOST = 4
"""Most methods that are compared."""


class Compared(NamedTuple):
    """What can be said of a − b: the verdict, then a sentence for each question; and what it must be read with."""

    a: str
    b: str
    sentences: list[str]
    notes: list[str]


def two_by_two(evidence: Evidence, matrices: pd.DataFrame) -> tuple[list[Compared], str]:
    """Compare every two methods. Nothing is computed anew.

    Subspaces are compared where the layers' ranks are equal, and the last checkpoints of one epoch.

    Args:
        evidence: Of all their runs.
        matrices: Its spectra, as ``tables.matrices.prepare`` makes them.

    Returns:
        The comparisons; and why there are none, or "".
    """
    names = method_labels(matrices)
    if len(names) > MOST:
        return [], (
            f"{len(names)} methods are too many to compare two by two here; "
            "`msplora-analyze compare` compares the two that you choose."
        )
    runs = {name: set(matrices.loc[matrices["variant"] == name, "run"]) for name in names}
    layers = matrices[matrices["scale"] == "layer"]
    ranks = {name: set(layers.loc[layers["variant"] == name, "rank"]) for name in names}
    keys = evidence.matrices.keys
    last = keys[keys["last"]]
    found = []
    for a, b in combinations(sorted(names, key=is_msplora, reverse=True), 2):  # MSPLoRA − LoRA, as in Figure 4
        one_epoch = last.loc[last["run"].isin(runs[a] | runs[b]), "epoch"].nunique(dropna=False) == 1
        together = bool(ranks[a] and ranks[b]) and len(ranks[a] | ranks[b]) == 1 and one_epoch
        said: list[str] = []
        note = "" if together else "Subspaces are not compared: ranks or last epochs differ."
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                table = compare(*(_side(evidence, name, runs[name], together) for name in (a, b)))
                said = [verdict(table), *sentences(table)]
            except AnalysisError as error:
                note = str(error)
        notes = dict.fromkeys(filter(None, (note, *(str(warning.message) for warning in caught))))
        found.append(Compared(a, b, [printable(one) for one in said], [printable(one) for one in notes]))
    return found, ""


def _side(evidence: Evidence, label: str, runs: set[str], with_pairs: bool) -> Side:
    spectra = evidence.spectra[evidence.spectra["run"].isin(runs)]
    adapters = [adapter for adapter in evidence.adapters if adapter.run in runs]
    pairs = evidence.pairs[evidence.pairs["run"].isin(runs)]
    known = units(dict.fromkeys(spectra["run"]), adapters)
    return Side(label, spectra, pairs if with_pairs and set(pairs["run"]) == runs else None, known)
