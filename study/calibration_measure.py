"""What each cut of a run's adapter costs, and what each measure says of it: the part `measure` of study/calibration.py.

Moments come from the first 512 training examples, costs from the whole validation split. No measure has a constant that
is fitted to the costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from msplora_analysis.compute.measures.metrics import effective_rank, m_eff
from msplora_core.data.loading import Split
from msplora_core.measure.ablation import ablate
from msplora_core.measure.cuts import Bases, Closed, Cut, standard_cuts
from msplora_core.measure.loading import Subject, load_subject
from msplora_core.measure.recording import record_moments
from msplora_core.measure.updates import Update, updates_of
from msplora_core.moments import Array, Moments

EXAMPLES = 512
RANKS = (1, 2, 3, 4)
RANDOM_CUTS = 40
NUMBERS_OF_EXAMPLES = (32, 128, 512, 2048, 4096)
RECORDED_AT_ONCE, MEASURED_AT_ONCE = 32, 64


def load(run: Path, model: Path, data_dir: Path | None) -> Subject:
    """A run's last adapter, with its examples; the longest last, as padding then costs little."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32, on a GPU; the cut "noise" tells what it costs
    return load_subject(run, data_dir=data_dir, model=str(model))


def measured(subject: Subject, seed: int) -> pd.DataFrame:
    """A row for each cut: its cost, what it is predicted to cost, and the measures of what it takes away."""
    updates, moments = updates_of(subject.model), recorded(subject, EXAMPLES)
    cuts = list(all_cuts(updates, seed))
    table = ablate(subject.model, batches(subject), cuts=cuts, moments=moments).table(subject.task.metric, draws=1000)
    bases = Bases(updates, moments)
    grams = plain_moments(updates)
    tokens = moments.about["tokens"] / moments.about["examples"]
    return table.join(pd.DataFrame([measures(cut, bases, grams) for cut in cuts])).assign(tokens_an_example=tokens)


def by_examples(subject: Subject, seed: int) -> pd.DataFrame:
    """The same cuts, predicted from other numbers of examples and from given labels; and cuts that these choose.

    Of a cut by the task-weighted spectrum the directions depend on the examples: it is measured for each number.
    """
    return pd.DataFrame(_by_examples(subject, seed))


def _by_examples(subject: Subject, seed: int) -> Iterator[dict[str, Any]]:
    updates = updates_of(subject.model)
    grams = plain_moments(updates)
    cuts = [cut for cut in all_cuts(updates, seed) if all("task" not in of.basis for of in cut.closed.values())]
    most = len(subject.splits["train"].rows)
    plans = [("sampled", n) for n in NUMBERS_OF_EXAMPLES if n <= most] + [("given", EXAMPLES)]
    for labels, n in plans:
        about = {"labels": labels, "examples": n}
        moments = recorded(subject, n, labels)
        bases = Bases(updates, moments)
        factor = 2.0 if moments.about["loss"] == "regression" else 1.0  # as in the table of an ablation
        for cut in cuts[1:]:
            key = {"cut": cut.cut, "what": cut.what, "rank": cut.rank}
            energy = measures(cut, bases, grams)["task_energy"] if cut.cut == "module" else np.nan
            yield about | key | {"task_energy": energy, "predicted_kl": factor * bases.predicted(cut), "kl": np.nan}
        chosen = [Cut("rank_task", rank=rank, closed=to_rank(updates, rank, "task")) for rank in (1, 2)]
        table = ablate(subject.model, batches(subject), cuts=chosen, moments=moments).table(
            subject.task.metric, draws=2
        )
        for row in table.iloc[1:].to_dict("records"):
            yield about | {name: row[name] for name in ("cut", "what", "rank", "predicted_kl", "kl")}


def recorded(
    subject: Subject, examples: int, labels: str = "sampled", *, first: int = 0, cores: bool = False
) -> Moments:
    """Moments of training examples, in the order of the file from ``first`` up to ``examples``."""
    some = Split(subject.splits["train"].rows[first:examples], subject.splits["train"].source)
    own = replace(subject, splits={"train": _by_length(some, subject)})
    of = own.batches("train", batch_size=RECORDED_AT_ONCE)
    return record_moments(subject.model, of, labels=labels, keep_cores=cores)


def batches(subject: Subject) -> list[dict[str, torch.Tensor]]:
    validation = _by_length(subject.splits["validation"], subject)
    return replace(subject, splits={"validation": validation}).batches("validation", batch_size=MEASURED_AT_ONCE)


def _by_length(split: Split, subject: Subject) -> Split:
    columns = subject.task.text_columns
    return Split(sorted(split.rows, key=lambda row: sum(len(row[column]) for column in columns)), split.source)


def all_cuts(updates: Mapping[str, Update], seed: int) -> Iterator[Cut]:
    """The standard ones; each scale cut to each rank; random directions of random modules; and one that cuts nothing.

    The last, ``noise``, puts every update together again from its directions. What it costs is the error of arithmetic.
    """
    yield from standard_cuts(updates, RANKS, task=True)
    first = next(iter(updates.values()))  # all have the same scales and ranks
    for scale, rank in zip(first.scales, first.ranks, strict=True) if len(first.scales) > 1 else ():
        for k in (k for k in RANKS if k < rank):
            closed = {name: Closed("scale_plain", update.columns(scale)[k:]) for name, update in updates.items()}
            yield Cut("scale_rank", scale, rank=k, closed=closed)
    rng = np.random.default_rng(seed)
    names = list(updates)
    for number in range(RANDOM_CUTS):
        basis = ("plain", "task")[number % 2]
        some = rng.choice(names, round(np.exp(rng.uniform(0, np.log(len(names))))), replace=False).tolist()
        closed = {name: _some(updates[name], basis, rng) for name in some}
        yield Cut("random", f"{basis} {number}", closed=closed)
    yield Cut("noise", closed={name: Closed("plain", ()) for name in names})


def _some(update: Update, basis: str, rng: np.random.Generator) -> Closed:
    return Closed(basis, sorted(rng.choice(update.rank, rng.integers(1, update.rank + 1), replace=False).tolist()))


def to_rank(updates: Mapping[str, Update], rank: int, basis: str) -> dict[str, Closed]:
    return {name: Closed(basis, range(rank, u.rank)) for name, u in updates.items() if u.rank > rank}


def plain_moments(updates: Mapping[str, Update]) -> dict[str, tuple[Array, Array]]:
    """A Aᵀ and Bᵀ B of every module: what stands in the place of moments where nothing is weighted."""
    return {name: (a.numpy(), b.numpy()) for name, update in updates.items() for a, b in (update.grams(),)}


def measures(cut: Cut, bases: Bases, grams: Mapping[str, tuple[Array, Array]]) -> dict[str, float]:
    """What each measure says of the part that a cut takes away, E = B M A of every module.

    energy, input_energy, output_energy, task_energy: Σ over modules of ‖E‖², ‖E C^½‖², ‖G^½ E‖² and ‖G^½ E C^½‖².
    predicted_alone: the gates' prediction, each module by itself. effective_rank, m_eff_1, task_effective_rank: means
    over the modules.
    """
    assert bases.moments is not None
    sums = dict.fromkeys(("energy", "input_energy", "output_energy", "task_energy", "predicted_alone"), 0.0)
    spectra: dict[str, list[float]] = {"effective_rank": [], "m_eff_1": [], "task_effective_rank": []}
    for name, closed in cut.closed.items():
        update, moments = bases.updates[name], bases.moments.modules[name]
        lost = np.eye(update.rank)
        if len(set(closed.places)) < update.rank:
            lost = lost - bases.core(name, closed)
        gram_a, gram_b = grams[name]
        for key, a, b in (
            ("energy", gram_a, gram_b),
            ("input_energy", moments.s_a, gram_b),
            ("output_energy", gram_a, moments.s_b),
            ("task_energy", moments.s_a, moments.s_b),
        ):
            sums[key] += float(np.einsum("ij,jk,lk,li->", lost, a, lost, b, optimize=True))
        scores = moments.scores[closed.basis][:, list(closed.places)].sum(1, dtype=np.float64)
        sums["predicted_alone"] += bases.moments.predicted_kl(scores)
        plain, task = _sigma(lost, gram_a, gram_b), _sigma(lost, moments.s_a, moments.s_b)
        spectra["effective_rank"].append(float(effective_rank(plain)))
        spectra["m_eff_1"].append(float(m_eff(plain, 1)))
        spectra["task_effective_rank"].append(float(effective_rank(task)))
    means = {key: float(np.mean(of)) if of else np.nan for key, of in spectra.items()}
    return {"modules": float(len(cut.closed)), **sums, **means}


def _sigma(m: Array, s_a: Array, s_b: Array) -> Array:
    """Singular values of S_b^½ M S_a^½, descending."""
    return np.linalg.svd(_root(s_b).T @ m @ _root(s_a), compute_uv=False)


def _root(s: Array) -> Array:
    values, vectors = np.linalg.eigh(s)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def write(table: pd.DataFrame, about: Mapping[str, Any], path: Path) -> None:
    """Write a run's rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    keys: Sequence[str] = list(about)
    table.assign(**about)[[*keys, *table.columns]].to_csv(beside, index=False, float_format="%.6g", lineterminator="\n")
    beside.replace(path)
