"""Findings: what in the tables deserves a look, with the numbers that say so.

    from msplora_analysis.ask.evidence import gather, of_tables
    from msplora_analysis.ask.findings import diagnose

    diagnose(gather(["runs/cola"], Options(), Execution()))     # reads the adapters, compares layers and scales too
    diagnose(of_tables(spectra, metrics, pairs, scales))        # from tables; all but the first may be left out

A finding is evidence, no verdict: it names a place, a number, and what the number was held against. Thresholds without
a source were set on healthy runs, so that hardly any of these has a warning or an error. docs/findings.md has in how
many of 291 others each finding was seen, and how many planted faults it finds. Errors are faults of training or saving;
warnings are what healthy runs do not show; the rest is information.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.ask.findings import against_base, base, learned, pairs, spectrum, update
from msplora_analysis.ask.findings.base import SEVERITIES, Finding, Kind

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["KINDS", "SEVERITIES", "Finding", "Kind", "diagnose"]

FAMILIES = (update, learned, pairs, spectrum, against_base)
KINDS = {kind.id: kind for family in FAMILIES for kind in family.KINDS}


def diagnose(evidence: Evidence) -> pd.DataFrame:
    """All findings, one row each, the most severe first.

    Returns:
        Columns id, severity (error, warning, info), the key columns (empty where they do not apply), value, threshold,
        evidence, source (of the threshold), advice, details (JSON, or empty).

    Raises:
        AnalysisError: a table is not what it should be.
    """
    return base.to_table(finding for family in FAMILIES for check in family.CHECKS for finding in check(evidence))
