"""Spectral analysis of LoRA and MSPLoRA adapters, from the files that training leaves behind.

    import msplora_analysis as ma

    spectra = ma.load_spectra("runs/cola")   # one row per singular value
    metrics = ma.load_metrics("runs/cola")   # one row per matrix
    pairs = ma.load_pairs("runs/cola")       # one row per two layers: what they share
    ablation = ma.load_ablation("runs/cola") # one row per part left out: what the task loses
    moments = ma.load_moments("runs/cola")   # one row per module: what its task asks of it
    ma.advise("runs/cola")                   # did it learn, what rank does it use, which scales to keep
    ma.diagnose("runs/cola")                 # what deserves a look
    ma.check("runs/cola/checkpoint-500")     # what vLLM, llama.cpp, diffusers, ... will do with it
    ma.compare("runs/a", "runs/b")           # two methods, with intervals

``load_...`` read adapters: a path, or a list of paths. Verbs take the same, or the tables that these gave. All tables
are pandas DataFrames. Importing the package imports nothing else: each name below loads its module when first used.
"""

from __future__ import annotations

import importlib as _importlib
import typing as _typing

from msplora_analysis.errors import AnalysisError as AnalysisError
from msplora_core.version import __version__ as __version__

# For type checkers, and below for Python: a new name needs a line in both, which a test compares.
if _typing.TYPE_CHECKING:
    from msplora_analysis.ask.nulls import load_nulls as load_nulls
    from msplora_analysis.ask.results.summary import load_results as load_results
    from msplora_analysis.interface import advise as advise
    from msplora_analysis.interface import check as check
    from msplora_analysis.interface import compare as compare
    from msplora_analysis.interface import diagnose as diagnose
    from msplora_analysis.interface import load_ablation as load_ablation
    from msplora_analysis.interface import load_moments as load_moments
    from msplora_analysis.live.callback import SpectraCallback as SpectraCallback
    from msplora_analysis.show.figures import draw_figures as draw_figures
    from msplora_analysis.show.figures import write_figures as write_figures
    from msplora_analysis.show.figures.comparison import plot_comparison as plot_comparison
    from msplora_analysis.show.figures.decoupling import plot_decoupling_over_epochs as plot_decoupling_over_epochs
    from msplora_analysis.show.figures.effective_rank import (
        plot_effective_rank_over_epochs as plot_effective_rank_over_epochs,
    )
    from msplora_analysis.show.figures.effective_rank_map import plot_effective_rank_map as plot_effective_rank_map
    from msplora_analysis.show.figures.joint_basis import plot_joint_basis as plot_joint_basis
    from msplora_analysis.show.figures.kl_difference import plot_figure4 as plot_figure4
    from msplora_analysis.show.figures.kl_matrices import plot_kl_between_layers as plot_kl_between_layers
    from msplora_analysis.show.figures.layer_spectra import plot_spectra_by_layer as plot_spectra_by_layer
    from msplora_analysis.show.figures.layers_share import plot_layers_share as plot_layers_share
    from msplora_analysis.show.figures.m_eff import plot_m_eff_over_epochs as plot_m_eff_over_epochs
    from msplora_analysis.show.figures.metric_against_rank import plot_metric_against_rank as plot_metric_against_rank
    from msplora_analysis.show.figures.nulls import plot_nulls as plot_nulls
    from msplora_analysis.show.figures.overlap_matrices import (
        plot_overlap_between_layers as plot_overlap_between_layers,
    )
    from msplora_analysis.show.figures.predicted_against_measured import (
        plot_predicted_against_measured as plot_predicted_against_measured,
    )
    from msplora_analysis.show.figures.rank_needed import plot_rank_needed as plot_rank_needed
    from msplora_analysis.show.figures.relations import plot_relations as plot_relations
    from msplora_analysis.show.figures.singular_values import plot_figure3 as plot_figure3
    from msplora_analysis.show.figures.what_carries import plot_what_carries as plot_what_carries
    from msplora_analysis.show.report import report as report
    from msplora_analysis.tables.files import read_spectra as read_spectra
    from msplora_analysis.tables.load import load_metrics as load_metrics
    from msplora_analysis.tables.load import load_spectra as load_spectra
    from msplora_analysis.tables.load import load_tables as load_tables
    from msplora_analysis.tables.pairs import load_pairs as load_pairs
    from msplora_analysis.tables.pairs import load_redundancy as load_redundancy
    from msplora_analysis.tables.pairs import load_scale_pairs as load_scale_pairs
    from msplora_analysis.tables.parts import load_parts as load_parts
    from msplora_analysis.tables.relations import relate as relate
    from msplora_analysis.tables.scales import parts as parts
    from msplora_analysis.tables.scales import totals as totals
    from msplora_analysis.write.concatenate import export as export
    from msplora_analysis.write.extract import extract as extract
    from msplora_analysis.write.merge import merge as merge
    from msplora_analysis.write.share import share as share
    from msplora_analysis.write.truncate import compress as compress

_MODULES = {
    "SpectraCallback": "live.callback",
    "advise": "interface",
    "check": "interface",
    "compare": "interface",
    "compress": "write.truncate",
    "diagnose": "interface",
    "draw_figures": "show.figures",
    "export": "write.concatenate",
    "extract": "write.extract",
    "load_ablation": "interface",
    "load_metrics": "tables.load",
    "load_moments": "interface",
    "load_nulls": "ask.nulls",
    "load_pairs": "tables.pairs",
    "load_parts": "tables.parts",
    "load_redundancy": "tables.pairs",
    "load_results": "ask.results.summary",
    "load_scale_pairs": "tables.pairs",
    "load_spectra": "tables.load",
    "load_tables": "tables.load",
    "parts": "tables.scales",
    "plot_comparison": "show.figures.comparison",
    "plot_decoupling_over_epochs": "show.figures.decoupling",
    "plot_effective_rank_map": "show.figures.effective_rank_map",
    "plot_effective_rank_over_epochs": "show.figures.effective_rank",
    "plot_figure3": "show.figures.singular_values",
    "plot_figure4": "show.figures.kl_difference",
    "plot_kl_between_layers": "show.figures.kl_matrices",
    "plot_m_eff_over_epochs": "show.figures.m_eff",
    "plot_overlap_between_layers": "show.figures.overlap_matrices",
    "plot_rank_needed": "show.figures.rank_needed",
    "plot_spectra_by_layer": "show.figures.layer_spectra",
    "plot_layers_share": "show.figures.layers_share",
    "plot_joint_basis": "show.figures.joint_basis",
    "plot_nulls": "show.figures.nulls",
    "merge": "write.merge",
    "plot_metric_against_rank": "show.figures.metric_against_rank",
    "plot_predicted_against_measured": "show.figures.predicted_against_measured",
    "plot_relations": "show.figures.relations",
    "plot_what_carries": "show.figures.what_carries",
    "read_spectra": "tables.files",
    "relate": "tables.relations",
    "report": "show.report",
    "share": "write.share",
    "totals": "tables.scales",
    "write_figures": "show.figures",
}

__all__ = ["AnalysisError", "__version__", *_MODULES]


def __getattr__(name: str) -> _typing.Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
