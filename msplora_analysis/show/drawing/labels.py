"""What figures call each measure, with symbol and unit: the same words everywhere; ticks."""

import math

from msplora_analysis.compute.measures.registry import measures

LABELS = {one.name: one.axis for one in measures("metrics")} | {
    "epoch": "epoch",
    "layer": "layer",
    "layer_i": "layer $i$",
    "layer_j": "layer $j$",
    "k": "index $k$",
    "sigma": r"singular value $\sigma_k$",
    "relative": r"$\sigma_k / \sigma_1$",
    "kl": r"KL$(i\,\Vert\,j)$ (nats)",
    "kl_difference": r"difference of KL$(i\,\Vert\,j)$ (nats)",
    "kl_matched": "KL, ranks matched",
    "js": "JS, ranks matched",
    "js_difference": "difference of JS (nats)",
    "overlap": "subspace overlap",
    "excess": "overlap beyond chance",
    "overlap_in": "overlap, input side",
    "overlap_out": "overlap, output side",
    "shared_in": "shared energy, input side",
    "shared_out": "shared energy, output side",
    "overlap_difference": "difference of overlap beyond chance",
    "cosine": "cosine of updates",
    "effective_rank_over_r": "effective rank / rank",
    "rank_needed": "directions needed",
}


def log_ticks(low: float, high: float) -> dict[float, str]:
    """Ticks of a logarithmic axis from ``low`` to ``high`` that are read at once, few enough to stand apart."""
    wide = high / low
    steps = (1,) if wide > 2000 else (1, 3) if wide >= 100 else (1, 2, 5) if wide >= 5 else range(1, 10)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    inside = [tick for tick in ticks if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]
    return {tick: f"{tick:.3g}" for tick in inside or [low, high]}
