"""One answer on an adapter: did it learn, what rank does it use, which modules, scales and checkpoint are worth it.

An answer is given where something measured decides it, and says how sure it is. What weights alone cannot tell stays
open, with the command that would tell it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from msplora_analysis.ask.advice.checkpoint import LOSS, which
from msplora_analysis.ask.advice.cuts import of_scale, pattern_below, predicted, whole
from msplora_analysis.ask.advice.learned import learned
from msplora_analysis.ask.advice.ranks import rank_table
from msplora_analysis.ask.advice.subject import Answer, Subject
from msplora_analysis.ask.advice.training import Course, course_of

KL = 0.003
"""Nats an example that a cut may cost by its gates, where no ablation says what it does to the metric.

Chosen on 17 adapters of docs/calibration.md, none of which lost more than LOSS; of 18 others two did.
"""
PAYS = 0.15
"""The share of parameters from which on a rank for each module is worth its trouble."""


@dataclass(frozen=True)
class RunAdvice:
    """All answers on one adapter.

    Args:
        ranks: The table of ``ask.advice.ranks.rank_table``.
        scales: One row per scale of MSPLoRA: scale, parameters, predicted_kl, kl, metric_change; else empty.
        rank: The rank that is enough; None where that is not known.
    """

    subject: Subject = field(repr=False)
    answers: Sequence[Answer]
    ranks: pd.DataFrame = field(repr=False)
    scales: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    rank: int | None = None


def advise(subject: Subject) -> RunAdvice:
    """What is known of one adapter, as answers.

    Args:
        subject: The adapter with its tables, moments and ablation.
    """
    course = course_of(subject.adapter)
    ranks = rank_table(*subject.whole, subject.moments, subject.ablation)
    scales = scale_table(subject)
    learned = _learned(subject, course)
    answers = [learned]
    rank = None
    if learned.value is not False:
        answer, rank = _rank(subject, ranks)
        answers += [answer, *_modules(subject, ranks, rank), *_anew(ranks, rank)]
        answers += [*_scales(scales, _limit(subject)), *which(subject, course)]
    return RunAdvice(subject, answers, ranks, scales, rank)


def _learned(subject: Subject, course: Course | None) -> Answer:
    question = "Did it learn anything?"
    spectra, _ = subject.whole
    is_zero = not spectra["sigma"].to_numpy().any()
    found = learned(subject.adapter, subject.moments, is_zero=is_zero)
    evidence, sure = [found.evidence] if found.evidence else [], ""
    if is_zero:
        sure = "Certain: the file says so."
    elif course is not None and len(course.points) > 1 and course.points[0][0] == 0:
        (_, before), (_, now) = course.points[0], course.at(subject.adapter.epoch)
        evidence.append(f"{course.metric} {before:.3f} before training, {now:.3f} now; a head learned too.")
    if found.value:
        sure = "Effects as large as this are predicted roughly, within a factor of 4 or so."
    command = subject.moments_command if found.value is None else None
    return Answer(question, found.answer, " ".join(evidence), sure, command, found.value)


def _lowest(ranks: pd.DataFrame, enough: pd.Series[bool]) -> pd.Series[Any]:
    """The row of the lowest rank that is enough; of the whole adapter where none is."""
    return ranks[enough].iloc[0] if enough.any() else ranks.sort_values("rank").iloc[-1]


def _rank(subject: Subject, ranks: pd.DataFrame) -> tuple[Answer, int | None]:
    question, full = "What rank does it use?", int(ranks["rank"].max())
    compress = f"msplora-analyze compress {subject.path} --out DIR --rank"
    if ranks["metric_change"].notna().sum() > 1:
        sign = -1 if subject.ablation is not None and (subject.ablation["metric_name"] == "perplexity").all() else 1
        row = _lowest(ranks, sign * ranks["metric_change"] >= -LOSS)
        rank = int(row["rank"])
        evidence = f"Cut to rank {rank}, the metric changes by {row['metric_change']:+.3f}"
        evidence += f" (95 % interval {row['low']:+.3f} to {row['high']:+.3f})."
        if rank == full:
            evidence = f"Every lower rank that was measured loses more than {LOSS:g} of the metric."
        return _rank_answer(question, rank, full, evidence, "Measured on the validation data.", compress), rank
    if (limit := _limit(subject)) is not None and ranks["predicted_kl"].notna().any():
        row = _lowest(ranks, ranks["predicted_kl"] <= limit)
        rank = int(row["rank"])
        evidence = f"Cut to rank {rank}, the outputs move by {row['predicted_kl']:.2g}{subject.unit}."
        if rank == full:
            evidence = f"Every lower rank listed moves the outputs by more than {limit:.2g}{subject.unit}."
        sure = "Predicted from the task's gates. Of 18 adapters cut so, two lost more than 0.01 of the metric "
        sure += "(docs/calibration.md). msplora-measure ablate would measure it here."
        return _rank_answer(question, rank, full, evidence, sure, compress), rank
    energy = int(_lowest(ranks, ranks["energy"] >= 0.99)["rank"])
    evidence = f"Rank {energy} holds 99 % of the energy. Energy tells what is large, not what the task needs."
    if subject.lacks_head:
        evidence += " The task cannot be measured with this file: its head was not saved in it."
    return Answer(question, "Weights alone do not tell.", evidence, command=subject.moments_command), None


def _limit(subject: Subject) -> float | None:
    """What a cut may cost by its gates: KL nats; of a regression, whose outputs have no unit, a hundredth of all."""
    if subject.moments is None or not subject.moments.is_regression:
        return KL
    scores = whole(subject.moments)
    return None if scores is None else predicted(subject.moments, scores) / 100


def _rank_answer(question: str, rank: int, full: int, evidence: str, sure: str, compress: str) -> Answer:
    if rank == full:
        return Answer(question, f"All {full}.", evidence, sure, value=rank)
    return Answer(question, f"{rank} of {full}.", evidence, sure, f"{compress} {rank}", rank)


def _modules(subject: Subject, ranks: pd.DataFrame, rank: int | None) -> list[Answer]:
    """Whether ranks of its own for each module save much, at what the rank for all would cost."""
    moments, (_, metrics) = subject.moments, subject.whole
    if moments is None or rank is None or moments.is_regression:
        return []
    even = ranks[ranks["rank"] == rank].iloc[0]
    nats = float(even["predicted_kl"]) or KL
    if not np.isfinite(nats) or (pattern := pattern_below(moments, metrics, nats)) is None:
        return []
    question, saved = "Do modules need different ranks?", 1 - pattern.parameters / even["parameters"]
    evidence = f"A rank for each module takes {pattern.parameters:,} parameters, rank {rank} for all "
    evidence += f"{int(even['parameters']):,}; both move the outputs by about {nats:.2g} nats an example."
    sure = "Predicted from the task's gates, on examples that the choice did not see."
    if saved < PAYS:
        return [Answer(question, "Hardly: one rank for all does as well.", evidence, sure, value=False)]
    command = f"msplora-analyze compress {subject.path} --out DIR --kl {nats:.3g}"
    answer = f"Yes: that saves {saved:.0%} of the parameters."
    return [Answer(question, answer, evidence, sure, command, pattern.ranks)]


def _anew(ranks: pd.DataFrame, rank: int | None) -> list[Answer]:
    """What docs/calibration.md found of trainings at the advised rank and pattern: no reason to do so."""
    full = int(ranks["rank"].max())
    if rank is None or rank == full:
        return []
    evidence = "LoRA on MiniLM, trained anew at the advised rank, scored 0.009 to 0.022 less than at rank 8 (CoLA, "
    evidence += "MRPC, RTE; 10 seeds each); the cut cost 0.003 at most. A rank for each module was no better."
    sure = "One model, four tasks; on STS-B rank 8 failed in 2 of 10 seeds (docs/calibration.md)."
    return [Answer("Train anew at that rank?", f"Better train at rank {full} and cut.", evidence, sure, value=False)]


def scale_table(subject: Subject) -> pd.DataFrame:
    """What each scale of MSPLoRA costs and carries.

    Returns:
        Columns scale, parameters (of its shared factors, once), predicted_kl (nats an example, of leaving it out), and
        of an ablation kl, metric_change, low, high. Empty for an adapter without several scales.
    """
    if len(subject.scales) < 2:
        return pd.DataFrame()
    rows = []
    for scale in subject.scales:
        _, own = subject.of_scale(scale)
        size = ((own["rows"] + own["cols"]) * own["rank"]).sum()
        row: dict[str, object] = {"scale": scale, "parameters": int(size)}
        if subject.moments is not None and (scores := of_scale(subject.moments, scale)) is not None:
            row["predicted_kl"] = predicted(subject.moments, scores)
        if subject.ablation is not None:
            measured = subject.ablation[(subject.ablation["cut"] == "scale") & (subject.ablation["what"] == scale)]
            if len(measured):
                row |= {name: measured[name].iloc[0] for name in ("kl", "metric_change", "low", "high")}
        rows.append(row)
    columns = ["scale", "parameters", "predicted_kl", "kl", "metric_change", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _scales(scales: pd.DataFrame, limit: float | None) -> list[Answer]:
    if limit is None or scales.empty or scales[["predicted_kl", "kl"]].isna().all(axis=None):
        return []
    question = "Which scales earn their parameters?"
    cost = scales["kl"].fillna(scales["predicted_kl"])
    idle = scales.loc[cost <= limit, "scale"].tolist()
    measured = bool(scales["kl"].notna().all())
    evidence = ", ".join(
        f"{scale} {value:.2g} ({parameters:,} parameters)"
        for scale, value, parameters in zip(scales["scale"], cost, scales["parameters"], strict=True)
    )
    evidence = f"What leaving it out costs, in nats an example: {evidence}."
    sure = "Measured on the validation data." if measured else "Predicted from the task's gates."
    answer = f"Not {' and '.join(idle)}." if idle else "All of them carry something."
    return [Answer(question, answer, evidence, sure, value=idle)]
