"""What two updates have in common: layers that hold the same, scales that are not decoupled."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.ask.findings.base import Finding, Kind
from msplora_analysis.formats import shares_layers
from msplora_analysis.tables.checkpoints import last_checkpoints
from msplora_analysis.tables.columns import KEYS
from msplora_analysis.tables.matrices import stacks_of
from msplora_analysis.tables.rows import rows_of

if TYPE_CHECKING:
    import pandas as pd

IDENTICAL = Kind(
    "identical-update",
    "warning",
    "two layers have the same update",
    "our choice: cosine of 0.95 between the updates; 0.14 is the most between two layers in healthy runs",
    "check that the layers were not given one adapter by mistake (copied tensors, a wrong layer number); if it is "
    "meant, share it: MSPLoRA's mid or global part, or tied adapters",
)
REDUNDANT = Kind(
    "adjacent-redundant",
    "info",
    "neighbouring layers write from and to nearly the same directions",
    "our choice: subspace overlap (arXiv 2106.09685, section 7) of 0.3 on both sides and 3 times chance; 0.07 is the "
    "most in healthy runs, where chance is 0.02",
    "candidates for sharing one adapter (MSPLoRA's mid part, or tied adapters): try it, and compare the task metric",
)
COUPLED = Kind(
    "scales-coupled",
    "info",
    "two scales of a layer are not decoupled",
    "our choice: as between layers, an overlap of 0.3 on both sides and 3 times chance, or a cosine of 0.6; 99 % of "
    "the pairs of scales in 42 healthy runs are below it, half are below 0.1",
    "one of the two scales may be enough: try a run without it, and compare the task metric",
)

SAME, OVERLAP, CHANCE, COSINE = 0.95, 0.3, 3.0, 0.6


def between_layers(evidence: Evidence) -> Iterator[Finding]:
    """At the last checkpoint: any two layers with one update, and neighbours that overlap."""
    if evidence.pairs.empty:
        return
    pairs = last_checkpoints(evidence.pairs)
    # What is shared by design is no mistake: the common parts of a total, and whole methods.
    shared = {adapter.run for adapter in evidence.adapters if shares_layers(adapter.config)}
    pairs = pairs[(pairs["scale"] != "total") & ~pairs["run"].isin(shared)]
    for of_run in _places(pairs):
        groups = sorted({*of_run["group_i"], *of_run["group_j"]})
        following = dict(pairwise(groups))
        for row in rows_of(of_run):
            low, high = sorted((row["group_i"], row["group_j"]))
            place = _place(row, group=low, name=row.get("name_i"))
            found: dict[str, Any] = {"groups": [int(low), int(high)]}
            units = "layers" if row["scale"] == "layer" else f"{row['scale']} groups"
            what = f"{units} {low} and {high}: {_numbers(row)}"
            if abs(row["cosine"]) >= SAME:
                yield Finding(IDENTICAL, place, float(row["cosine"]), SAME, what, details=found)
            elif following.get(low) == high and _overlaps(row):
                yield Finding(REDUNDANT, place, _overlap(row), OVERLAP, what, details=found)


def between_scales(evidence: Evidence) -> Iterator[Finding]:
    if evidence.scales.empty:
        return
    for row in rows_of(last_checkpoints(evidence.scales)):
        scales = [row["scale_i"], row["scale_j"]]
        is_alike = abs(row["cosine"]) >= COSINE
        if is_alike or _overlaps(row):
            place = _place(row, scale="-".join(scales))
            text = f"{scales[0]} and {scales[1]} part of layer {row['group']}: {_numbers(row)}"
            value, threshold = (row["cosine"], COSINE) if is_alike else (_overlap(row), OVERLAP)
            yield Finding(COUPLED, place, float(value), threshold, text, details={"scales": scales})


def _places(pairs: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The pairs of each run, scale and module; of each stack too, where the table has the names."""
    by = ["run", "scale", "module"]
    if "name_i" in pairs:
        pairs, by = pairs.assign(stack=stacks_of(pairs["name_i"])), [*by, "stack"]
    for _, rows in pairs.groupby(by, sort=False):
        yield rows


def _overlap(row: dict[str, Any]) -> float:
    """The smaller of both sides: an update is shared only if it reads and writes the same."""
    return float(np.minimum(row["overlap_in"], row["overlap_out"]))


def _overlaps(row: dict[str, Any]) -> bool:
    """Whether both sides overlap, each far beyond its own chance (where the table has it)."""
    return all(
        row[f"overlap_{side}"] >= max(OVERLAP, CHANCE * row.get(f"expected_{side}", row["overlap_expected"]))
        for side in ("in", "out")
    )


def _numbers(row: dict[str, Any]) -> str:
    return (
        f"overlap in {row['overlap_in']:.2g}, out {row['overlap_out']:.2g} "
        f"(chance {row['overlap_expected']:.2g}), cosine {row['cosine']:.2g}"
    )


def _place(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {name: row.get(name) for name in KEYS} | more


CHECKS = (between_layers, between_scales)
KINDS = (IDENTICAL, REDUNDANT, COUPLED)
