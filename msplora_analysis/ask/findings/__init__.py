"""Findings: what in the tables deserves a look, with the numbers that say so.

    from msplora_analysis.ask.findings import diagnose, load_findings

    load_findings("runs/cola")                        # reads the adapters, compares layers and scales too
    diagnose(spectra, metrics, pairs, scales=scales)  # from tables; all but the first may be left out

A finding is evidence, no verdict: it names a place, a number, and what the number was held against. Thresholds without
a source were set on 45 healthy runs (MiniLM; LoRA and MSPLoRA; CoLA, MRPC and STS-B), so that none of these has a
warning or an error; nor has any of 51 more (SmolLM2-135M too) that were made later. Errors are faults of training or
saving; warnings are what healthy runs do not show; the rest is information.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from msplora_analysis.ask.findings import against_base, base, pairs, spectrum, update
from msplora_analysis.ask.findings.base import SEVERITIES, Broken, Evidence, Finding, Kind
from msplora_analysis.ask.findings.load import load_findings

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "KINDS",
    "SEVERITIES",
    "Broken",
    "Evidence",
    "Finding",
    "Kind",
    "diagnose",
    "load_findings",
    "rank_patterns",
]

FAMILIES = (update, pairs, spectrum, against_base)
KINDS = {kind.id: kind for family in FAMILIES for kind in family.KINDS}


def diagnose(
    spectra: pd.DataFrame,
    metrics: pd.DataFrame | None = None,
    pairs: pd.DataFrame | None = None,
    *,
    scales: pd.DataFrame | None = None,
    relative: pd.DataFrame | None = None,
    broken: Iterable[Broken] = (),
) -> pd.DataFrame:
    """All findings, one row each, the most severe first.

    spectra, metrics: the tidy tables. pairs, scales: those of ``redundancy``. relative: that of
    ``against_base.measure``. broken: checkpoints that hold NaN or Inf, and so are not in the tables.

    Columns: id, severity (error, warning, info), the key columns (empty where they do not apply),
    value, threshold, evidence, source (of the threshold), advice, details (JSON, or empty).
    """
    matrices = base.gather(spectra, metrics) if len(spectra) else None
    evidence = Evidence(matrices, tuple(broken), pairs, scales, relative)
    return base.to_table(finding for family in FAMILIES for check in family.CHECKS for finding in check(evidence))


def rank_patterns(findings: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Run -> a ``rank_pattern`` for PEFT's LoraConfig: the rank that each module with unused rank made use of.

    Only of runs whose adapters have no scales but ``layer``; MSPLoRA's shared parts have no rank per module.
    """
    found: dict[str, dict[str, int]] = {}
    unused = findings[findings["id"] == spectrum.UNUSED.id]
    for run, name, details in zip(unused["run"], unused["name"], unused["details"], strict=True):
        if isinstance(details, str):
            found.setdefault(run, {})[name] = json.loads(details)["rank_pattern"]
    return found
