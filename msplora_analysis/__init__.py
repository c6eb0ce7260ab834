"""Spectral analysis of LoRA and MSPLoRA adapters, from the files that training leaves behind.

    import msplora_analysis as ma
    spectra = ma.load_spectra("runs/cola")      # one row per singular value
    metrics = ma.load_metrics("runs/cola")      # one row per matrix

Importing the package imports nothing else: each name below loads its module when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from msplora_analysis.errors import AnalysisError

if TYPE_CHECKING:
    from msplora_analysis.comparison.compare import compare
    from msplora_analysis.figures import write_figures
    from msplora_analysis.findings import diagnose
    from msplora_analysis.findings.load import load_findings
    from msplora_analysis.redundancy.load import load_pairs, load_redundancy, load_scale_pairs
    from msplora_analysis.tables.files import read_spectra
    from msplora_analysis.tables.load import load_metrics, load_spectra, load_tables

__version__ = "0.1.0"

__all__ = [
    "AnalysisError",
    "__version__",
    "compare",
    "diagnose",
    "load_findings",
    "load_metrics",
    "load_pairs",
    "load_redundancy",
    "load_scale_pairs",
    "load_spectra",
    "load_tables",
    "read_spectra",
    "write_figures",
]

_MODULES = {
    "compare": "comparison.compare",
    "diagnose": "findings",
    "load_findings": "findings.load",
    "load_metrics": "tables.load",
    "load_pairs": "redundancy.load",
    "load_redundancy": "redundancy.load",
    "load_scale_pairs": "redundancy.load",
    "load_spectra": "tables.load",
    "load_tables": "tables.load",
    "read_spectra": "tables.files",
    "write_figures": "figures",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
