"""Directions by the exact Fisher information of each module's core, beside the task-weighted ones of its moments.

The parts `cores` and `steps` of study/calibration.py. A cut of a module is B M A with M of rank k. Moments choose M as
if inputs and gradients were independent; here M makes ½ mean ⟨core, M − I⟩² least, each example's core its r × r
gradient. There is no closed form: left and right factor are solved for in turn, from the task-weighted cut on.
``fisher λ``: the share λ of the information is that of the moments, as 512 examples do not determine r² × r² numbers.
``joint``: the spaces are the task-weighted ones, and what stands between them is solved for in all modules at once,
interactions counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
from calibration_measure import EXAMPLES, RANKS, all_cuts, batches, recorded, to_rank

from msplora_analysis.compute.choose import below_kl
from msplora_core.measure.ablation import measure, summed_up
from msplora_core.measure.cuts import Bases, Closed, Cut
from msplora_core.measure.loading import Subject
from msplora_core.measure.updates import Update, updates_of
from msplora_core.moments import Array, ModuleMoments, Moments, directions

SHARES = (0.0, 0.1, 0.5)
KL = (0.003, 0.01, 0.03)
TURNS = 40
STEPPED = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def by_cores(subject: Subject, seed: int) -> pd.DataFrame:
    """Every module cut to 1 to 4 directions, chosen in each way; and the cuts below a KL that `compress` makes."""
    del seed  # of the order of a part's arguments
    updates, moments = updates_of(subject.model), recorded(subject, EXAMPLES, cores=True)
    bases = _Chosen(updates, moments)
    ways = ["plain", "task", *(f"fisher {share:g}" for share in SHARES), "joint"]
    cuts = [Cut(way, rank=k, closed=to_rank(updates, k, way)) for k in RANKS for way in ways]
    scores = [moments.modules[name].scores["task"] for name in updates]
    for nats in KL:
        ranks = below_kl(scores, [update.sides for update in updates.values()], nats).ranks
        ranked = dict(zip(updates, ranks, strict=True))
        closed = {name: Closed("task", range(k, updates[name].rank)) for name, k in ranked.items()}
        cuts.append(Cut("kl", f"{nats:g}", closed={name: of for name, of in closed.items() if of.places}))
    cuts = [Cut("none"), *cuts]
    parts = list(measure(subject.model, batches(subject), cuts, bases))
    return summed_up(cuts, bases, parts).table(subject.task.metric, draws=1000)


def by_steps(subject: Subject, seed: int) -> pd.DataFrame:
    """What 32 to 4,096 examples predict, given their labels or not, from one recording: moments are means, cores rows.

    Columns labels, examples, cut, what, rank, predicted_kl; of cuts to task-weighted directions that these examples
    choose also priced_kl: what all examples together predict that they cost.
    """
    updates = updates_of(subject.model)
    cuts = [cut for cut in all_cuts(updates, seed) if {of.basis for of in cut.closed.values()} == {"plain"}]
    chosen = [Cut("rank_task", rank=k, closed=to_rank(updates, k, "task")) for k in RANKS]
    rows, most = [], min(STEPPED[-1], len(subject.splits["train"].rows))
    steps = [0, *(n for n in STEPPED if n < most), most]
    judge = None
    for labels in ("sampled", "given"):
        pieces = [recorded(subject, end, labels, first=first, cores=True) for first, end in pairwise(steps)]
        judge = judge or _Chosen(updates, _pooled(pieces))
        for end in range(1, len(steps)):
            bases = _Chosen(updates, _pooled(pieces[:end]))
            for cut in [*cuts, *chosen]:
                row = {"labels": labels, "examples": steps[end], "cut": cut.cut, "what": cut.what, "rank": cut.rank}
                row["predicted_kl"] = bases.predicted(cut)
                if cut.cut == "rank_task":
                    row["priced_kl"] = judge.predicted(cut, chosen_by=bases)
                rows.append(row)
    return pd.DataFrame(rows)


def _pooled(pieces: Sequence[Moments]) -> Moments:
    """The moments of all pieces' examples together."""
    tokens = [piece.about["tokens"] for piece in pieces]
    modules = {}
    for name, one in pieces[0].modules.items():
        own = [piece.modules[name] for piece in pieces]
        s_a, s_b = (np.average([getattr(of, side) for of in own], axis=0, weights=tokens) for side in ("s_a", "s_b"))
        cores = np.concatenate([of.cores for of in own if of.cores is not None])
        modules[name] = replace(one, s_a=s_a, s_b=s_b, cores=cores, scores={})
    return Moments(modules, pieces[0].about)


class _Chosen(Bases):
    """Bases that know the cuts of this study too."""

    def __init__(self, updates: Mapping[str, Update], moments: Moments) -> None:
        super().__init__(updates, moments)
        self.modules = moments.modules
        self._cores: dict[tuple[str, str, int], Array] = {}
        self._terms = {name: _in_directions(module) for name, module in self.modules.items()}

    def core(self, name: str, closed: Closed) -> Array:
        if closed.basis in ("plain", "task"):
            return super().core(name, closed)
        left, right, _, _ = self._terms[name]
        return left @ self._middle(name, closed) @ right

    def predicted(self, cut: Cut, *, chosen_by: Bases | None = None) -> float:
        lost: Array | float = 0.0
        for name, closed in cut.closed.items():
            whole = len(set(closed.places)) == self.updates[name].rank
            core = np.zeros((self.updates[name].rank,) * 2) if whole else (chosen_by or self).core(name, closed)
            cores = self.modules[name].cores
            assert cores is not None
            lost = lost + np.einsum("nij,ij->n", cores.astype(np.float64), np.eye(len(core)) - core)
        return Moments.predicted_kl(np.asarray(lost)) if cut.closed else 0.0

    def _middle(self, name: str, closed: Closed) -> Array:
        k = self.updates[name].rank - len(closed.places)
        if (name, closed.basis, k) not in self._cores:
            if closed.basis == "joint":
                self._cores |= {(of, "joint", k): middle for of, middle in self._joint(k).items()}
            else:
                _, _, cores, sigma = self._terms[name]
                self._cores[name, closed.basis, k] = _nearest(cores, sigma, k, float(closed.basis.split()[1]))
        return self._cores[name, closed.basis, k]

    def _joint(self, k: int) -> dict[str, Array]:
        """Of each module the k × k between its task-weighted spaces, of all modules at once."""
        terms = self._terms.values()
        design = np.concatenate([cores[:, :k, :k].reshape(len(cores), -1) for *_, cores, _ in terms], 1)
        target = sum(np.einsum("nii->n", cores) for *_, cores, _ in terms)
        weight = [_scale(cores, sigma) * np.repeat(sigma[:k] ** 2, k) * len(cores) for *_, cores, sigma in terms]
        start = np.tile(np.eye(k).ravel(), len(self._terms))
        ridge = np.diag(0.1 * np.concatenate(weight))
        found = start + np.linalg.solve(design.T @ design + ridge, design.T @ (target - design @ start))
        middles = {}
        for name, part in zip(self._terms, np.split(found, len(self._terms)), strict=True):
            middles[name] = np.zeros((self.updates[name].rank,) * 2)
            middles[name][:k, :k] = part.reshape(k, k)
        return middles


def _in_directions(module: ModuleMoments) -> tuple[Array, Array, Array, Array]:
    """left, right, each example's core between these directions, and the task-weighted singular values."""
    sigma, left, right = directions(module.s_a, module.s_b)
    assert module.cores is not None
    return left, right, np.einsum("ia,nij,bj->nab", left, module.cores.astype(np.float64), right, optimize=True), sigma


def _scale(cores: Array, sigma: Array) -> float:
    """What the moments' information is multiplied by to be as large as that of the cores."""
    return float((cores**2).sum() / len(cores) / (len(sigma) * (sigma**2).sum()))


def _nearest(cores: Array, sigma: Array, k: int, share: float) -> Array:
    """M of rank k with the least vec(M − I)ᵀ F vec(M − I), of the information F of one module."""
    r = len(sigma)
    fisher = (1 - share) * np.einsum("nij,nkl->ijkl", cores, cores, optimize=True) / len(cores)
    alone = np.arange(r)
    fisher[alone[:, None], alone, alone[:, None], alone] += share * _scale(cores, sigma) * sigma[:, None] ** 2
    target = np.einsum("ijmm->ij", fisher)
    left, right = np.eye(r)[:, :k], np.eye(r)[:k]
    for _ in range(TURNS):
        left = _solved(np.einsum("ijkl,aj,bl->iakb", fisher, right, right, optimize=True), target @ right.T)
        left = np.linalg.qr(left)[0]
        of_right = np.einsum("ijkl,ia,kb->ajbl", fisher, left, left, optimize=True)
        right = _solved(of_right, left.T @ target)
    return np.asarray(left @ right)


def _solved(quadratic: Array, target: Array) -> Array:
    square = quadratic.reshape(target.size, target.size)
    slightly = 1e-9 * np.trace(square) / len(square) * np.eye(len(square))
    return np.asarray(np.linalg.solve(square + slightly, target.ravel()).reshape(target.shape))
