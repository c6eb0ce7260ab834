"""One answer on an adapter: did it learn, what rank does it use, which modules, scales and checkpoint are worth it.

An answer is given where something measured decides it, and says how sure it is. What weights alone cannot tell stays
open, with the command that would tell it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.ask.advice.cuts import of_scale, pattern_below, predicted, whole
from msplora_analysis.ask.advice.ranks import rank_table
from msplora_analysis.ask.advice.training import Course, course_of
from msplora_core.names import SCALES, TOTAL

if TYPE_CHECKING:
    from msplora_core.moments import Moments

KL = 0.003
"""Nats an example that a cut may cost by its gates, where no ablation says what it does to the metric.

Chosen on 17 adapters of docs/calibration.md, none of which lost more than LOSS; of 18 others two did.
"""
LOSS = 0.01
"""Of the metric that a cut may lose, where an ablation measured it."""
PAYS = 0.15
"""The share of parameters from which on a rank for each module is worth its trouble."""
NOTHING = 1e-3
"""Nats an example below which leaving out a whole adapter, or a scale, changes next to nothing."""


@dataclass(frozen=True)
class Subject:
    """One adapter and all that is known of it.

    Args:
        spectra, metrics: Its rows of the tidy tables.
        moments: What its task asks of it, if recorded.
        ablation: What leaving out its parts did, if measured.
    """

    adapter: Adapter
    spectra: pd.DataFrame
    metrics: pd.DataFrame
    moments: Moments | None = None
    ablation: pd.DataFrame | None = None

    @property
    def whole(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Both tables, of the whole updates alone."""
        if (self.metrics["scale"] == TOTAL).any():
            return self.of_scale(TOTAL)
        return self.spectra, self.metrics

    def of_scale(self, scale: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Both tables, of one scale."""
        return self.spectra[self.spectra["scale"] == scale], self.metrics[self.metrics["scale"] == scale]

    @property
    def scales(self) -> list[str]:
        """The scales of MSPLoRA that it has, in the order of ``SCALES``."""
        present = set(self.metrics["scale"])
        return [scale for scale in SCALES if scale in present]


@dataclass(frozen=True)
class Answer:
    """An answer to one question.

    Args:
        question: As a user asks it.
        answer: In a sentence.
        evidence: The numbers behind it.
        sure: How sure it is, and why.
        command: What to run next: to do it, or to know it.
        value: What a program reads: a rank, a scale, a step.
    """

    question: str
    answer: str
    evidence: str = ""
    sure: str = ""
    command: str | None = None
    value: object = None


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
        answers += [*_scales(scales, _limit(subject)), *_checkpoint(course)]
    return RunAdvice(subject, answers, ranks, scales, rank)


def _learned(subject: Subject, course: Course | None) -> Answer:
    question = "Did it learn anything?"
    spectra, _ = subject.whole
    if not spectra["sigma"].to_numpy().any():
        return Answer(question, "No: every update is zero.", sure="Certain: the file says so.", value=False)
    evidence, learned = [], None
    if subject.moments is not None and (scores := whole(subject.moments)) is not None:
        kl = predicted(subject.moments, scores)
        evidence.append(f"Without it the outputs move by about {kl:.2g}{_unit(subject)} (predicted).")
        learned = kl > NOTHING
    if course is not None and len(course.points) > 1 and course.points[0][0] == 0:
        (_, before), (_, after) = course.points[0], course.points[-1]
        evidence.append(f"{course.metric} {before:.3f} before training, {after:.3f} now; a head learned too.")
    if learned is None:
        answer = "It changed the weights. Whether that serves the task, weights alone do not tell."
        return Answer(question, answer, " ".join(evidence), command=_moments_command(subject))
    answer = "Yes." if learned else "Next to nothing."
    sure = "Effects as large as this are predicted roughly, within a factor of 4 or so." if learned else ""
    return Answer(question, answer, " ".join(evidence), sure, value=bool(learned))


def _lowest(ranks: pd.DataFrame, enough: pd.Series[bool]) -> pd.Series[Any]:
    """The row of the lowest rank that is enough; of the whole adapter where none is."""
    return ranks[enough].iloc[0] if enough.any() else ranks.sort_values("rank").iloc[-1]


def _rank(subject: Subject, ranks: pd.DataFrame) -> tuple[Answer, int | None]:
    question, full = "What rank does it use?", int(ranks["rank"].max())
    compress = f"msplora-analyze compress {_path(subject)} --out DIR --rank"
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
        evidence = f"Cut to rank {rank}, the outputs move by {row['predicted_kl']:.2g}{_unit(subject)}."
        if rank == full:
            evidence = f"Every lower rank listed moves the outputs by more than {limit:.2g}{_unit(subject)}."
        sure = "Predicted from the task's gates. Of 18 adapters cut so, two lost more than 0.01 of the metric "
        sure += "(docs/calibration.md). msplora-measure ablate would measure it here."
        return _rank_answer(question, rank, full, evidence, sure, compress), rank
    energy = _lowest(ranks, ranks["energy"] >= 0.99)["rank"]
    evidence = f"Rank {energy} holds 99 % of the energy. Energy tells what is large, not what the task needs."
    return Answer(question, "Weights alone do not tell.", evidence, command=_moments_command(subject)), None


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
    command = f"msplora-analyze compress {_path(subject)} --out DIR --kl {nats:.3g}"
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


def _checkpoint(course: Course | None) -> list[Answer]:
    if course is None or len(course.points) < 3:
        return []
    question = "Which checkpoint?"
    (best_at, best), (last_at, last) = course.best, course.points[-1]
    ahead = (best - last) * (1 if course.greater_is_better else -1)
    evidence = f"{course.metric} {last:.3f} at the last epoch ({last_at:g}), {best:.3f} at its best ({best_at:g})."
    sure = "The best of many on the same data is best partly by chance."
    if ahead <= LOSS:
        return [Answer(question, "The last.", evidence, sure, value=last_at)]
    return [Answer(question, f"That of epoch {best_at:g}.", evidence, sure, value=best_at)]


def _unit(subject: Subject) -> str:
    is_regression = subject.moments is not None and subject.moments.is_regression
    return " (mean squared difference)" if is_regression else " nats an example"


def _moments_command(subject: Subject) -> str:
    return f"msplora-measure moments {_path(subject)}"


def _path(subject: Subject) -> str:
    """As a shell takes it, from the working directory where that is shorter."""
    folder = str(subject.adapter.file.parent)
    if isinstance(subject.adapter.file, Path):
        with suppress(ValueError, OSError):  # on another drive; a working directory that is gone
            folder = min(os.path.relpath(folder), folder, key=len)
    return shlex.quote(folder)
