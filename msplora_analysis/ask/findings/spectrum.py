"""What a single spectrum shows: a dominant direction, rank that is not used or does not suffice, convergence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.ask.findings.base import Finding, Kind, when
from msplora_analysis.compute.measures.metrics import Array, effective_rank, frobenius, m_eff
from msplora_analysis.compute.measures.rank_needed import SHARE, energy_rank
from msplora_analysis.tables.matrices import Matrices

DOMINANT = Kind(
    "dominant-direction",
    "info",
    "one direction holds nearly all of the update",
    "our choice: M_eff-1 (arXiv 2503.21838, eq. 8) of 0.9; 5 % of the matrices of rank 8 in 96 healthy runs reach "
    "it, so it is no fault by itself",
    "a lower rank may do for this module; before stacking it with other adapters, compare the norm with theirs",
)
GROWING = Kind(
    "dominance-growing",
    "warning",
    "one direction takes over as training goes on",
    "our choice: M_eff-1 of 0.8, and over the second half of 10 checkpoints or more sigma_1 grew twice as much as the "
    "rest (1.6 times is the most in 45 healthy runs, cut anywhere); the rank-1 spikes of "
    "github.com/ostris/ai-toolkit/issues/964",
    "take an earlier checkpoint, or lower the learning rate or train fewer steps for these modules; such adapters are "
    "reported to disturb others when stacked",
)
UNUSED = Kind(
    "rank-unused",
    "info",
    f"{SHARE:.0%} of the energy lies in half of the rank or less",
    f"our choice: {SHARE:.0%} of the sum of squares; a spectrum does not prove what rank a task needs",
    "keep the rank for training, cut the trained adapter (msplora-analyze compress --energy 0.99), then compare the "
    "task metric (msplora-measure ablate)",
)
OVERSIZED = Kind(
    "rank-oversized",
    "warning",
    f"{SHARE:.0%} of the energy of most matrices lies in an eighth of the rank or less",
    "our choice; the median is a quarter of the rank or more in each of 15 healthy LoRA runs with rank 8",
    "train again with a rank near the one used, and compare the task metric: much of this one buys nothing visible",
)
SATURATED = Kind(
    "rank-saturated",
    "info",
    "the spectrum is flat: every direction is used alike",
    "our choice: effective rank (Roy & Vetterli 2007) of 0.95 r; below 0.9 r in healthy runs with rank 8",
    "a higher rank may help, or rank-stabilised scaling (rsLoRA, arXiv 2312.03732); a flat spectrum is also what "
    "little training leaves",
)
CONVERGED = Kind(
    "spectra-converged",
    "info",
    "the spectra have stopped changing",
    "our choice: no spectrum is more than 2 % (of its norm) from the last; with a rate decaying to zero, healthy runs "
    "get there after 80 % of the steps",
    "this checkpoint is a candidate to keep, if the task metric agrees; spectra do not show rotations",
)

RANK = 4  # below which shares of the rank are too coarse to say anything
DOMINANCE, FINAL, LEAD, CHECKPOINTS = 0.9, 0.8, 2.0, 10
EIGHTH, FLAT = 1 / 8, 0.95
SETTLED, EARLY = 0.02, 0.75


def dominant_direction(evidence: Evidence) -> Iterator[Finding]:
    for last in _last(evidence):
        for row, share in enumerate(m_eff(last.sigma, 1)):
            if share >= DOMINANCE and last.keys["rank"][row] >= RANK:
                text = f"sigma_1 is {share:.1%} of the sum of its {last.keys['rank'][row]} singular values (M_eff-1)"
                yield Finding(DOMINANT, last.place(int(row)), float(share), DOMINANCE, text)


def dominance_growing(evidence: Evidence) -> Iterator[Finding]:
    """From the middle of the checkpoints with an update to the last, if there are enough to tell it from the start."""
    parts = evidence.matrices.parts()
    is_long = parts.keys.groupby("run")["time"].transform("max") >= CHECKPOINTS - 1
    for series in parts.where(is_long & (parts.sigma[:, 0] > 0)).groups("run", "scale", "module", "name"):
        order = np.argsort(series.keys["time"].to_numpy())
        if len(order) < CHECKPOINTS or series.keys["rank"].max() < RANK:
            continue
        ends = [order[(len(order) - 1) // 2], order[-1]]
        middle, last = series.sigma[ends]
        (before, after), rest = m_eff(series.sigma[ends], 1), frobenius(series.sigma[ends][:, 1:])
        lead = (last[0] / middle[0]) / (rest[1] / rest[0]) if rest.all() else np.inf if rest[0] else 1.0
        if after >= FINAL and lead >= LEAD:
            place = series.place(int(order[-1]))
            text = (
                f"M_eff-1 {before:.3g} at {when(series.place(int(ends[0])))}, {after:.3g} at {when(place)}; "
                f"sigma_1 {middle[0]:.3g} -> {last[0]:.3g}"
            )
            yield Finding(GROWING, place, float(lead), LEAD, text)


def rank_unused(evidence: Evidence) -> Iterator[Finding]:
    for last in _last(evidence):
        used = energy_rank(last.sigma)
        rank = last.keys["rank"].to_numpy()
        for row in np.flatnonzero((used <= rank / 2) & (rank >= RANK)):
            text = f"{SHARE:.0%} of the energy in {used[row]:.0f} of {rank[row]} directions"
            yield Finding(UNUSED, last.place(int(row)), float(used[row]), float(rank[row] / 2), text)


def rank_oversized(evidence: Evidence) -> Iterator[Finding]:
    for last in _last(evidence):
        for scale in last.groups("scale"):
            rank = scale.keys["rank"].to_numpy()
            shares = energy_rank(scale.sigma) / rank
            if np.isnan(shares).all() or rank.max() < RANK:
                continue
            if (median := float(np.nanmedian(shares))) <= EIGHTH:
                place = {name: scale.place(0)[name] for name in ("run", "step", "epoch", "scale")}
                used = float(np.nanmedian(energy_rank(scale.sigma)))
                text = f"median over {len(rank)} matrices: {used:.0f} of {np.median(rank):.0f} directions"
                yield Finding(OVERSIZED, place, median, EIGHTH, text)


def rank_saturated(evidence: Evidence) -> Iterator[Finding]:
    for last in _last(evidence):
        rank = last.keys["rank"].to_numpy()
        flat = effective_rank(last.sigma) / rank
        for row in np.flatnonzero((flat >= FLAT) & (rank >= RANK)):
            text = f"effective rank {flat[row] * rank[row]:.3g} of {rank[row]}"
            yield Finding(SATURATED, last.place(int(row)), float(flat[row]), FLAT, text)


def spectra_converged(evidence: Evidence) -> Iterator[Finding]:
    """The first checkpoint from which on every spectrum of the run stays near its last."""
    for run in evidence.matrices.parts().groups("run"):
        distance = _distance_to_last(run)
        progress = run.keys["step"].fillna(run.keys["epoch"]).groupby(run.keys["time"]).max().to_numpy(np.float64)
        if len(distance) < 4 or not progress[-1] > 0:
            continue
        far = np.flatnonzero(~(distance <= SETTLED))
        since = far[-1] + 1 if len(far) else 0
        if since > 0 and progress[since] <= EARLY * progress[-1]:
            rows = run.keys["time"] == since
            place = {name: run.where(rows).place(0)[name] for name in ("run", "step", "epoch")}
            largest = float(distance[since:].max())
            text = (
                f"since {when(place)} no spectrum was more than {largest:.1%} from that of "
                f"{when(run.where(run.keys['last']).place(0))}"
            )
            yield Finding(CONVERGED, place, largest, SETTLED, text)


def _distance_to_last(run: Matrices) -> Array:
    """Per checkpoint, the largest ‖sigma - sigma_last‖ / ‖sigma_last‖ over the matrices."""
    last = run.where(run.keys["last"])
    rows = {name: row for row, name in enumerate(zip(last.keys["scale"], last.keys["name"], strict=True))}
    of_last = [rows.get(name, -1) for name in zip(run.keys["scale"], run.keys["name"], strict=True)]
    target = np.where(np.array(of_last)[:, None] >= 0, last.sigma[of_last], np.nan)
    norms = frobenius(target)
    change = np.linalg.norm(run.sigma - target, axis=1)
    distance = np.divide(change, norms, out=np.where(change > 0, np.inf, 0.0), where=norms > 0)
    by_time = run.keys.assign(distance=distance).groupby("time")["distance"].max()
    return by_time.to_numpy(dtype=np.float64)


def _last(evidence: Evidence) -> Iterator[Matrices]:
    """The parts of each run's last checkpoint."""
    parts = evidence.matrices.parts()
    yield from parts.where(parts.keys["last"]).groups("run")


CHECKS = (dominance_growing, dominant_direction, rank_oversized, rank_unused, rank_saturated, spectra_converged)
KINDS = (GROWING, DOMINANT, OVERSIZED, UNUSED, SATURATED, CONVERGED)
