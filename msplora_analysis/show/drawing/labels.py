"""What figures call each measure, with symbol and unit: the same words everywhere."""

LABELS = {
    "epoch": "epoch",
    "layer": "layer",
    "layer_i": "layer $i$",
    "layer_j": "layer $j$",
    "k": "index $k$",
    "sigma": r"singular value $\sigma_k$",
    "kl": r"KL$(i\,\Vert\,j)$ (nats)",
    "kl_difference": r"difference of KL$(i\,\Vert\,j)$ (nats)",
    "kl_matched": "KL, ranks matched",
    "overlap": "subspace overlap",
    "overlap_in": "overlap, input side",
    "overlap_out": "overlap, output side",
    "overlap_difference": "difference of overlap beyond chance",
    "cosine": "cosine of updates",
    "effective_rank": "effective rank",
    "effective_rank_over_r": "effective rank / rank",
    "m_eff_1": r"$M_\mathrm{eff}$-1",
    "m_eff_2": r"$M_\mathrm{eff}$-2",
    "m_eff_4": r"$M_\mathrm{eff}$-4",
    "rank_needed": "directions needed",
}
