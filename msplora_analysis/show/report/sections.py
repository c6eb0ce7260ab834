"""What the page is made of: texts for the template, and the data that its script draws."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from msplora_analysis.ask.advice.advise import RunAdvice
from msplora_analysis.ask.advice.tell import RANK_HEADERS, rank_cells, title
from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.ask.findings import KINDS, SEVERITIES
from msplora_analysis.compute.measures.registry import measures
from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.show.report import charts, numbers
from msplora_analysis.show.report.about import About
from msplora_analysis.tables.labels import when, where
from msplora_analysis.tables.matrices import prepare
from msplora_analysis.tables.pair_means import summary
from msplora_analysis.tables.rows import rows_of

if TYPE_CHECKING:
    import pandas as pd

PLACES = 100
"""Most places of one finding that a page lists; `msplora-analyze diagnose` lists all."""

MEASURES = {one.name: one for place in ("report", "matrices") for one in measures(place)}

LINES = 8
"""Most runs with a line style each; of more, the runs of one method share theirs."""


def prepared(evidence: Evidence) -> tuple[pd.DataFrame | None, str]:
    """The matrices with the label of each run's method ('LoRA r=8'), as figures tell it; or None, and why not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first reading of the table said it
        try:
            return prepare(evidence.spectra), ""
        except AnalysisError as error:
            return None, str(error)


def labels_of(matrices: pd.DataFrame | None, runs: Sequence[str]) -> list[str]:
    """The label of each run's method; the name of the run where there is none."""
    found = {} if matrices is None else dict(zip(matrices["run"], matrices["variant"], strict=True))
    return [printable(found.get(run, run)) for run in runs]


def findings(found: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry per kind, the most severe first: what, evidence by place, what to try."""
    entries = []
    for (severity, kind), rows in found.groupby(["severity", "id"], sort=False):
        about = KINDS[str(kind)]
        places = [
            {"run": row["run"], "where": where(row), "when": when(row), "evidence": printable(row["evidence"])}
            for row in rows_of(rows.head(PLACES))
        ]
        entries.append(
            {"severity": severity, "id": kind, "title": about.title, "source": about.source, "advice": about.advice}
            | {"count": len(rows), "places": places, "more": len(rows) - len(places)}
        )
    return entries


def advice(of: RunAdvice) -> dict[str, Any]:
    """Title, answers and the table of ranks of the advice on a run."""
    headers = [header.replace("\n", " ") for header in RANK_HEADERS]
    return {"title": title(of), "answers": of.answers, "headers": headers, "rows": rank_cells(of.ranks)}


def severities(found: pd.DataFrame) -> list[tuple[str, int]]:
    counts = found["severity"].value_counts()
    return [(severity, int(counts.get(severity, 0))) for severity in SEVERITIES]


HINTS = {
    "sigma": "Singular values of the update; those of the largest share of Σσ² are its main directions",
    "share": "Each singular value over the sum of all: the shape of the spectrum without its size",
    "task_sigma": "Singular values weighted by what each direction is worth to the outputs, by the recorded moments",
    "task_share": "Each task-weighted singular value over the sum of all",
    "kl": "KL(i ‖ j) of the layers' spectra as distributions, in nats; 0 = the same shape (arXiv 2503.21838, eq. 10)",
    "overlap_in": "‖Uᵢᵀ Uⱼ‖² / K of what two updates read, their input directions; 1 = the same (arXiv 2106.09685)",
    "overlap_out": "‖Uᵢᵀ Uⱼ‖² / K of what two updates write, their output directions; 1 = the same (arXiv 2106.09685)",
    "needed": "The smallest number of directions whose σ² hold this share of Σσ²",
    "energy": "Share of Σσ² over all modules that is left when every module is cut to a rank, without more training",
    "task_energy": "The same of the task-weighted singular values",
    "curve": "As the trainer logged it (trainer_state.json, run.json)",
}
"""What a chart shows, said on its title."""


def payload(
    evidence: Evidence, abouts: Sequence[About], labels: Sequence[str], advice: Sequence[RunAdvice] = ()
) -> dict[str, Any]:
    """What the script draws. Names in it are data: the script shows them as text only."""
    runs = evidence.runs
    keys = evidence.matrices.keys
    places = numbers.places_of([*keys["name"], *evidence.pairs.get("name_i", ())])
    axis = numbers.axis_of(keys)
    title = {"time": "checkpoint"}.get(axis, axis)
    spectra, left = numbers.spectra(evidence.matrices, runs, axis, places)
    pairs, pairs_left = numbers.pairs(evidence.pairs, runs, places)
    styled = runs if len(runs) <= LINES else labels
    legend = list(dict.fromkeys(styled))
    task = {} if evidence.matrices.task is None else numbers.TASK_TITLES
    several = bool(keys.groupby("run")["time"].nunique().gt(1).any())
    return {
        "runs": [{"name": run, "label": label} for run, label in zip(runs, styled, strict=True)],
        "axis": title,
        "means": numbers.means(evidence.matrices, runs, axis) if several else None,
        "measures": numbers.MEASURES | task,
        "titles": numbers.TITLES | task,
        "spectra": spectra,
        "spectra_note": left,
        "pairs": pairs,
        "pairs_note": pairs_left,
        "matrices": numbers.matrix_table(evidence.matrices, runs, places),
        "curves": numbers.curves([about.curve for about in abouts]),
        "energies": numbers.energies(advice, runs),
        "energy_titles": numbers.ENERGIES,
        "shared": _shared(evidence),
        "specs": _specs(title, legend) | (_task_specs() if task else {}),
        "config": charts.CONFIG,
        "hints": HINTS | {name: f"{one.label}; high = {one.high} ({one.source})" for name, one in MEASURES.items()},
    }


def _specs(axis: str, legend: list[str]) -> dict[str, charts.Spec]:
    across, down = ("column", "layer j"), ("row", "layer i")
    pair = [("row", "i"), ("column", "j")]
    beside = [*pair, ("chance", "by chance"), ("cosine", "cosine of updates")]
    unit = [("unit", "unit"), ("k", "k")]
    of_layer = [("place", "module"), ("unit", "layer"), ("rank", "of rank")]
    return {
        "means": charts.lines(axis, "value", legend, shared=True),
        "curve": charts.lines("epoch", "value", legend),
        "energies": charts.lines("rank of every module", "kept", legend, shared=True),
        "sigma": charts.cells(("k", "k"), ("unit", ""), "σ", unit),
        "share": charts.cells(("k", "k"), ("unit", ""), "σ / Σσ", unit),
        "kl": charts.cells(across, down, "KL(i ‖ j), nats", pair, square=True),
        "overlap_in": charts.cells(across, down, "overlap", beside, square=True),
        "overlap_out": charts.cells(across, down, "overlap", beside, square=True),
        "needed": charts.cells(("unit", "layer"), ("place", ""), "directions", of_layer, step=24, texts=True),
    }


def _task_specs() -> dict[str, charts.Spec]:
    titles = {"task_sigma": "task-weighted σ", "task_share": "task-weighted σ / Σσ"}
    return {
        name: charts.cells(("k", "k"), ("unit", ""), title, [("unit", "unit"), ("k", "k")])
        for name, title in titles.items()
    }


def _shared(evidence: Evidence) -> numbers.Columns | None:
    """The table of means of ``redundancy``: what layers and scales share at the last checkpoint."""
    if not (len(evidence.pairs) or len(evidence.scales)):
        return None
    table = summary(evidence.pairs, evidence.scales)
    runs = evidence.runs
    columns: numbers.Columns = {"run": [runs.index(run) for run in table["run"]], "between": table["between"].tolist()}
    names = ("pairs", "overlap_in", "overlap_out", "overlap_expected", "cosine", "js")
    return columns | {name: numbers.rounded(table[name].astype("float64")) for name in names}


def glance(evidence: Evidence, abouts: Sequence[About], data: dict[str, Any]) -> numbers.Columns:
    """One row per run: what it is, how it ended, and its layers' spectra."""
    table = data["matrices"]
    columns: numbers.Columns = {"run": list(range(len(abouts)))}
    for name in ("method", "task", "seed"):
        columns[name] = [about.facts.get(name) for about in abouts]
    for name in ("rank", "effective_rank", "rank_needed_99"):
        of_run: dict[int, list[float]] = {}
        for run, scale, value in zip(table["run"], table["scale"], table[name], strict=True):
            if scale == "layer" and value is not None:
                of_run.setdefault(run, []).append(value)
        columns[name] = numbers.rounded(np.mean(of_run[run]) if run in of_run else np.nan for run in columns["run"])
    for name, curve in data["curves"].items():
        last = dict(zip(curve["run"], curve["value"], strict=True))
        columns[f"{name} (logged)" if name in columns else name] = [last.get(run) for run in columns["run"]]
    columns["model"] = [about.facts.get("model") for about in abouts]
    return {name: column for name, column in columns.items() if any(cell is not None for cell in column)}
