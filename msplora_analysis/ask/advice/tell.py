"""Advice as text, as JSON, and as files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from msplora_analysis.ask.advice.advise import RunAdvice
from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.tables.files import marked
from msplora_analysis.tables.labels import when
from msplora_analysis.tables.rows import rows_of
from msplora_core.atomic import replacing
from msplora_core.records import text_of

RANK_HEADERS = (
    "rank", "parameters", "MB", "energy", "task\nenergy", "predicted\nKL", "measured\nKL", "metric", "change",
)  # fmt: skip


def title(advice: RunAdvice) -> str:
    """Which adapter this is about."""
    adapter = advice.subject.adapter
    checkpoint = when({"step": adapter.step, "epoch": adapter.epoch}, "the only checkpoint")
    moments = advice.subject.moments
    known = []
    if moments is not None:
        known.append(f"moments of {moments.about.get('examples', '?')} examples")
    if advice.subject.ablation is not None:
        known.append("ablation")
    return printable(f"{adapter.run}, {checkpoint} ({', '.join(known) or 'weights alone'})")


def rank_cells(ranks: pd.DataFrame) -> list[list[str]]:
    """The table of ranks as text; what is not known is a dash."""
    return [
        [
            str(row["rank"]),
            f"{row['parameters']:,}",
            f"{row['megabytes']:.3g}",
            _text(row["energy"], ".1%"),
            _text(row["task_energy"], ".1%"),
            _text(row["predicted_kl"], ".2g"),
            _text(row["kl"], ".2g"),
            _text(row["metric"], ".3f"),
            _text(row["metric_change"], "+.3f"),
        ]
        for row in rows_of(ranks)
    ]


def as_object(advice: RunAdvice) -> dict[str, Any]:
    """What a program reads: run, step, epoch, answers, rank, ranks, scales."""
    adapter = advice.subject.adapter
    answers = [
        {
            "question": answer.question,
            "answer": answer.answer,
            "value": answer.value,
            "evidence": answer.evidence,
            "sure": answer.sure,
            "command": answer.command,
        }
        for answer in advice.answers
    ]
    return {
        "run": adapter.run,
        "step": adapter.step,
        "epoch": adapter.epoch,
        "file": str(adapter.file),
        "answers": answers,
        "rank": advice.rank,
        "ranks": _rows(advice.ranks),
        "scales": _rows(advice.scales),
    }


def write(found: Sequence[RunAdvice], out: Path) -> list[Path]:
    """advice.json and ranks.csv in ``out``.

    Raises:
        AnalysisError: they cannot be written.
    """
    ranks = pd.concat([one.ranks.assign(run=one.subject.adapter.run) for one in found], ignore_index=True)
    text = text_of({"advice": [as_object(one) for one in found]}) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / "advice.json") as beside:
            beside.write_text(text, encoding="utf-8")
        with replacing(out / "ranks.csv") as beside:
            marked(ranks[["run", *ranks.columns.drop("run")]]).to_csv(beside, index=False)
    except OSError as error:
        raise AnalysisError(f"out={out}: cannot be written: {error.strerror or error}", "out") from None
    return [out / "advice.json", out / "ranks.csv"]


def _text(value: Any, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        for row in rows_of(table)
    ]
