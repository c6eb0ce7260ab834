"""What figures call each measure, with symbol and unit: the same words everywhere."""

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
