"""Did every layer learn, and none too much? No update, NaN and Inf, norms that stand out or jump."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.ask.findings.base import Finding, Kind, when
from msplora_analysis.compute.measures.metrics import Array, frobenius
from msplora_analysis.tables.matrices import Matrices

NO_UPDATE = Kind(
    "no-update",
    "error",
    "the update is zero, or has not changed since the first checkpoint",
    "exact: an update that trains moves by more than rounding",
    "check that these modules take part in the forward pass, require gradients, are in the optimizer, and that the "
    "checkpoint was saved after training; a B that reloads as zero is a loading fault",
)
NON_FINITE = Kind(
    "non-finite",
    "error",
    "the file holds NaN or Inf",
    "exact",
    "take an earlier checkpoint; lower the learning rate, clip gradients, or train in bfloat16 or float32 instead of "
    "float16",
)
NORM_OUTLIER = Kind(
    "norm-outlier",
    "warning",
    "the norm stands out among the layers",
    "modified z-score above 3.5 (Iglewicz & Hoaglin 1993) and a factor of 4 from the trend over depth (our choice; "
    "seen in 1 of 291 healthy runs)",
    "look at this layer's gradients and learning rate, and at what was merged or scaled by hand; compare the task "
    "metric with the layer's part scaled down",
)
NORM_JUMP = Kind(
    "norm-jump",
    "warning",
    "the norm jumped between two checkpoints",
    "5 times the growth that a constant rate of change gives (our choice: 2.7 is the most in 96 healthy runs)",
    "look at the loss around this step; lower the learning rate, clip gradients, or take the checkpoint before it",
)
LARGE = Kind(
    "large-update",
    "warning",
    "the entries of the update are larger than those of trained weights usually are",
    "our choice: root mean square of 0.125; seen in none of 291 healthy runs, in which 0.07 is the most; the weights "
    "of transformers have about 0.02 to 0.1",
    "the training has probably diverged: look at the loss, lower the learning rate by a factor of 10 or more, check "
    "lora_alpha; --base compares with the weights themselves",
)

Z = 3.5
FACTOR = 4.0
JUMP = 5.0
RMS = 0.125
PEERS = 4  # layers below which a median says nothing
MOVED = 1e-6  # relative; files in float32 hold differences down to about 1e-7


def no_update(evidence: Evidence) -> Iterator[Finding]:
    """Zero at the run's last checkpoint (after step 0), or the same since its first."""
    for run in evidence.matrices.parts().groups("run"):
        first, last = (run.where(run.keys["time"] == time) for time in (0, run.keys["time"].max()))
        if ((last.keys["step"] == 0) | (last.keys["step"].isna() & (last.keys["epoch"] == 0))).all():
            continue  # the adapter before training, alone
        before = dict(zip(_names(first), first.sigma, strict=True))
        span = when(first.place(0)) if len(first.keys) else ""
        moved = bool(len(run.keys) > len(last.keys))
        for row, (key, sigma) in enumerate(zip(_names(last), last.sigma, strict=True)):
            place = last.place(row)
            if sigma[0] == 0:
                yield Finding(NO_UPDATE, place, 0.0, 0.0, f"every singular value is 0 at {when(place)}")
            elif moved and key in before:
                change = float(np.abs(sigma - before[key]).max() / sigma[0])
                if change <= MOVED:
                    text = f"no singular value moved by more than {change:.1g} of the largest since {span}"
                    yield Finding(NO_UPDATE, place, change, MOVED, text)


def non_finite(evidence: Evidence) -> Iterator[Finding]:
    for broken in evidence.broken:
        tensor = re.search(r"tensor (\S+) holds", broken.message)
        place = {"run": broken.run, "step": broken.step, "epoch": broken.epoch, "name": tensor[1] if tensor else None}
        yield Finding(NON_FINITE, place, np.nan, np.nan, broken.message)


def norm_outlier(evidence: Evidence) -> Iterator[Finding]:
    """Frobenius norms at the last checkpoint, against their trend over the layers of the same module and scale."""
    parts = evidence.matrices.parts()
    for peers in parts.where(parts.keys["last"]).groups("run", "scale", "module"):
        norms = frobenius(peers.sigma)
        peers, norms = peers.where(norms > 0), norms[norms > 0]
        if len(norms) < PEERS:
            continue
        factors, z = robust(norms, peers.keys["group"].to_numpy(dtype=np.float64))
        for row in np.flatnonzero((np.maximum(factors, 1 / factors) >= FACTOR) & (np.abs(z) > Z)):
            ratio = float(factors[row])
            text = (
                f"Frobenius norm {norms[row]:.3g}, {ratio:.3g} times what the trend over its {len(norms)} peers gives "
                f"(modified z-score {z[row]:.3g})"
            )
            place = peers.place(int(row))
            # A layer that learned little is no fault of itself.
            severity = None if ratio > 1 else "info"
            yield Finding(NORM_OUTLIER, place, ratio, FACTOR if ratio > 1 else 1 / FACTOR, text, severity)


def robust(norms: Array, depth: Array) -> tuple[Array, Array]:
    """Each norm over its trend, and its modified z-score 0.6745 (x - median) / MAD, of logarithms.

    Norms may rise or fall steadily with depth. The trend is the line of Theil and Sen (Sen 1968, JASA 63) through the
    medians of the layers, which a few layers that stand out do not move. depth: (n,), the layer's number.
    """
    logs = np.log(norms)
    layers = np.unique(depth[np.isfinite(depth)])
    slope = 0.0
    if len(layers) > 1:
        medians = np.array([np.median(logs[depth == layer]) for layer in layers])
        i, j = np.triu_indices(len(layers), 1)
        slope = float(np.median((medians[j] - medians[i]) / (layers[j] - layers[i])))
    rest = logs - slope * np.nan_to_num(depth)
    deviations = rest - np.median(rest)
    spread = np.median(np.abs(deviations))
    # Where most norms agree, whatever deviates stands out; what does not is 0 / 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.nan_to_num(0.6745 * deviations / spread, nan=0.0, posinf=np.inf, neginf=-np.inf)
    return np.exp(deviations), z


def norm_jump(evidence: Evidence) -> Iterator[Finding]:
    """Growth of the Frobenius norm from one checkpoint to the next, over the growth of the step."""
    parts = evidence.matrices.parts()
    of_series = ["run", "scale", "module", "name"]
    series = parts.keys.groupby(of_series, sort=False, dropna=False).ngroup().to_numpy()
    order = np.lexsort((parts.keys["time"].to_numpy(), series))
    norms = frobenius(parts.sigma)[order]
    steps = parts.keys["step"].fillna(parts.keys["epoch"]).to_numpy(dtype=np.float64)[order]
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = norms[1:] / norms[:-1] / (steps[1:] / steps[:-1])
    # Before training the norm is 0 and so is the step: both give NaN or infinity.
    known = (np.diff(series[order]) == 0) & np.isfinite(growth)
    for i in np.flatnonzero(known & (growth >= JUMP)):
        before, place = parts.place(int(order[i])), parts.place(int(order[i + 1]))
        ratio = norms[i + 1] / norms[i]
        text = (
            f"Frobenius norm {norms[i]:.3g} at {when(before)}, {norms[i + 1]:.3g} at {when(place)}: {ratio:.3g} times"
        )
        yield Finding(NORM_JUMP, place, float(growth[i]), JUMP, text)


def large_update(evidence: Evidence) -> Iterator[Finding]:
    """Root mean square entry ‖ΔW‖_F / sqrt(rows cols) of the whole update of a layer, at the last checkpoint."""
    keys = evidence.matrices.keys
    is_total = keys["scale"] == "total"
    last = evidence.matrices.where(keys["last"] & (is_total | ~is_total.groupby(keys["run"]).transform("any")))
    rms = frobenius(last.sigma) / np.sqrt((last.keys["rows"] * last.keys["cols"]).to_numpy(dtype=np.float64))
    for row in np.flatnonzero(rms >= RMS):
        text = f"root mean square of the update's entries {rms[row]:.3g}, its largest singular value "
        text += f"{last.sigma[row, 0]:.3g}"
        yield Finding(LARGE, last.place(int(row)), float(rms[row]), RMS, text)


def _names(matrices: Matrices) -> list[tuple[str, str]]:
    return list(zip(matrices.keys["scale"], matrices.keys["name"], strict=True))


CHECKS = (non_finite, no_update, large_update, norm_outlier, norm_jump)
KINDS = (NON_FINITE, NO_UPDATE, LARGE, NORM_OUTLIER, NORM_JUMP)
