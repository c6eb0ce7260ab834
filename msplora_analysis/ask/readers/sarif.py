"""Findings as SARIF 2.1.0 (OASIS), which code hosts and editors show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msplora_analysis.ask.readers.base import Fault
from msplora_core.version import __version__

_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def as_sarif(found: Sequence[Fault], file: str) -> dict[str, Any]:
    """One run of SARIF about a file."""
    rules = {_rule(finding): finding for finding in found}
    location = {"physicalLocation": {"artifactLocation": {"uri": file}}}
    return {
        "version": "2.1.0",
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "msplora-analyze check",
                        "version": __version__,
                        "rules": [
                            {"id": name, "shortDescription": {"text": finding.title}, "help": {"text": finding.source}}
                            for name, finding in rules.items()
                        ],
                    }
                },
                "results": [
                    {
                        "ruleId": _rule(finding),
                        "level": _LEVELS[finding.severity],
                        "message": {"text": f"{finding.title}: {finding.evidence}. Try: {finding.remedy}"},
                        "locations": [location],
                    }
                    for finding in found
                ],
            }
        ],
    }


def _rule(finding: Fault) -> str:
    return f"{finding.reader or 'any'}/{finding.id}"
