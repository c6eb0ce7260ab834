"""The numbers behind findings: how near a run is to each of them, whatever the threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.ask.findings import FAMILIES, KINDS, pairs, spectrum, update
from msplora_analysis.ask.findings.base import Check, Finding
from msplora_analysis.formats import shares_layers

NUMBERLESS = ("large-relative-update", "intruder-dimensions")
"""Kinds that need the base model, and so are not asked for here."""


@dataclass(frozen=True)
class Sign:
    """The largest number that a check meets in a run, as found with thresholds that let all through.

    Args:
        module: The file of the check.
        check: The check.
        threshold: The name of its threshold; ``let_through`` is a value that all reach.
        others: Values of its other thresholds meanwhile.
        speaks: Values with which it finds something wherever it can speak at all.
        silent: The number of a run of which the check can speak, and finds nothing.
        falls: A finding is what is *below* the threshold.
    """

    module: ModuleType
    check: Check
    threshold: str
    let_through: float = 0.0
    others: dict[str, float] = field(default_factory=dict)
    speaks: dict[str, float] = field(default_factory=dict)
    silent: float = 0.0
    falls: bool = False


SIGNS = {
    "large-update": Sign(update, update.large_update, "RMS"),
    "norm-outlier": Sign(update, update.norm_outlier, "FACTOR", 1.0, speaks={"Z": -1.0}, silent=1.0),
    "norm-jump": Sign(update, update.norm_jump, "JUMP"),
    "identical-update": Sign(pairs, pairs.between_layers, "SAME"),
    "dominance-growing": Sign(spectrum, spectrum.dominance_growing, "LEAD", speaks={"FINAL": 0.0}),
    "dominant-direction": Sign(spectrum, spectrum.dominant_direction, "DOMINANCE"),
    "rank-oversized": Sign(spectrum, spectrum.rank_oversized, "EIGHTH", 1.0, falls=True),
    "rank-saturated": Sign(spectrum, spectrum.rank_saturated, "FLAT"),
}
SPEAKS: dict[str, Callable[[Evidence], bool]] = {  # of kinds without a sign; others always do
    "rank-unused": lambda evidence: bool(evidence.matrices.keys["rank"].max() >= spectrum.RANK),
    "spectra-converged": lambda evidence: bool(evidence.matrices.keys["time"].max() >= 3),
    "adjacent-redundant": lambda evidence: (
        len(evidence.pairs) > 0 and not any(shares_layers(adapter.config) for adapter in evidence.adapters)
    ),
    "scales-coupled": lambda evidence: len(evidence.scales) > 0,
}
ASKED = [kind for kind in KINDS if kind not in NUMBERLESS]


def signs(evidence: Evidence, layers: set[int] | None = None) -> dict[str, Any]:
    """How many places each kind of finding names, and how near the run came to it.

    Args:
        evidence: Of one run.
        layers: Count only what is found in one of these layers. None: all of it.

    Returns:
        For each kind the count by its identifier; empty where the check cannot speak of this run. Findings milder than
        their kind are left out. With " value" behind it the number that is held against the threshold.
    """
    found = [f for family in FAMILIES for check in family.CHECKS for f in _at(check(evidence), layers)]
    row: dict[str, Any] = {}
    for kind in ASKED:
        able = True
        if sign := SIGNS.get(kind):
            value = number(sign, kind, evidence, layers)
            able = value is not None
            row[f"{kind} value"] = "" if value is None else f"{value:.5g}"
        elif kind in SPEAKS:
            able = SPEAKS[kind](evidence)
        # what is not finite has no number, and is a finding all the same
        count = sum(f.kind.id == kind and f.severity in (None, f.kind.severity) for f in found)
        row[kind] = count if able or count else ""
    return row


def number(sign: Sign, kind: str, evidence: Evidence, layers: set[int] | None) -> float | None:
    """The number of a run; None where the check cannot speak of it."""
    let_through = {sign.threshold: sign.let_through} | sign.others
    values = _values(sign, kind, evidence, layers, let_through)
    if not values:
        # what falls through here has no milder severity, so the whole run is asked
        return sign.silent if _values(sign, kind, evidence, None, let_through | sign.speaks) else None
    return min(values) if sign.falls else max(values)


def _values(
    sign: Sign, kind: str, evidence: Evidence, layers: set[int] | None, thresholds: dict[str, float]
) -> list[float]:
    with patch.multiple(sign.module, **thresholds):
        found = [f for f in _at(sign.check(evidence), layers) if f.kind.id == kind and f.severity is None]
    return [abs(f.value) for f in found if math.isfinite(f.value)]


def _at(found: Iterator[Finding], layers: set[int] | None) -> Iterator[Finding]:
    """What is found in a layer's own part, or between two of which it is one; of a whole run or file, too."""
    for finding in found:
        group, scale = finding.place.get("group"), finding.place.get("scale")
        groups = set(finding.details.get("groups", [group]))
        if layers is None or group is None or (scale in ("layer", "total") and groups & layers):
            yield finding
