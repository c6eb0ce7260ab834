"""Figure 3: the singular values of the global, mid and layer parts over the epochs of training."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from msplora_analysis.compute.measures.metrics import Array
from msplora_analysis.formats.updates import SCALES
from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, drawn, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.checkpoints import epochs_of
from msplora_analysis.tables.matrices import choose, is_msplora, ks, method_labels, prepare, slug, weighted

TOP = 8


def figure3(
    spectra: pd.DataFrame, method: str | None = None, *, weights: str = "none", style: str | None = None
) -> Figure:
    """One panel per scale, epochs across, index k down (1 at the top), colour = sigma_k on one scale for all panels.

    Source: MSPLoRA, arXiv 2503.21838, figure 3 (which shows ranks 8/8/8). A panel with many bright rows is a broad
    spectrum, that is a high effective rank; M_eff-k, the share of the k largest values, is then low.

    Args:
        spectra: Of `load_spectra`.
        method: Its label, such as "MSPLoRA 8/8/8"; the only one there is.
        weights: "moments": of the task-weighted spectra, `task_sigma`.
        style: See `venues.style_of`.
    """
    matrices = prepare(weighted(spectra, weights))
    return drawn(draw, numbers(matrices, choose("method", method, drawable(matrices))), style, weights)


@plots_of(figure3, order=1)
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    for method in drawable(matrices):
        yield Plot(f"figure3_{slug(method)}", numbers(matrices, method), draw)


def drawable(matrices: pd.DataFrame) -> list[str]:
    """Labels of MSPLoRA with at least two epochs."""
    ours = filter(is_msplora, method_labels(matrices))
    return [label for label in ours if len(epochs_of(matrices[matrices["variant"] == label])) > 1]


def numbers(matrices: pd.DataFrame, method: str) -> pd.DataFrame:
    """Mean sigma_k over groups, modules and runs. One row per scale, epoch and k ≤ min(rank, 8)."""
    parts = matrices[(matrices["variant"] == method) & (matrices["scale"] != "total")]
    by = parts.groupby(["scale", "epoch"])
    means = by[ks(parts)[:TOP]].mean().melt(var_name="k", value_name="sigma", ignore_index=False).reset_index()
    counts = by.agg(rank=("rank", "max"), runs=("run", "nunique"), matrices=("name", "size")).reset_index()
    table = means.merge(counts, on=["scale", "epoch"])
    table = table[table["k"] <= table["rank"]].astype({"k": int})
    table["scale"] = pd.Categorical(table["scale"], SCALES[:3])
    table = table.sort_values(["scale", "epoch", "k"], ignore_index=True).astype({"scale": str})
    table.insert(0, "variant", method)
    return table[["variant", "scale", "epoch", "k", "sigma", "rank", "runs", "matrices"]]


@styled
def draw(numbers: pd.DataFrame, style: Style) -> Figure:
    scales = list(numbers["scale"].unique())
    abreast = style.widest >= heatmap.NARROW
    figure = Figure(figsize=(style.widest, 2.3 if abreast else 0.9 + 1.3 * len(scales)), layout="constrained")
    rows, columns = (1, len(scales)) if abreast else (len(scales), 1)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    norm = heatmap.colour_scale(numbers["sigma"].max())
    last = numbers["k"].max()
    for ax, scale in zip(axes, scales, strict=True):
        part = numbers[numbers["scale"] == scale]
        values = part.pivot(index="k", columns="epoch", values="sigma")
        x_edges = _midpoints(values.columns.to_numpy(dtype=float))
        cells = heatmap.draw_cells(ax, values.to_numpy(), norm, colours.SEQUENTIAL, x_edges=x_edges, first_row=1)
        ax.set_ylim(last + 0.5, 0.5)
        if len(values) < last:
            heatmap.mark_absent(ax, x_edges, len(values) + 0.5, last + 0.5, f"rank {len(values)}")
        ax.set(title=f"{scale} (rank {part['rank'].max()})", yticks=range(1, last + 1))
    for ax in axes[:1] if abreast else axes:
        ax.set_ylabel(LABELS["k"])
    text.label_epochs(axes if abreast else axes[-1:], columns)
    bar_aspect = 18 if abreast else 18 * len(scales)
    figure.colorbar(cells, ax=axes, label=LABELS["sigma"], aspect=bar_aspect, pad=0.015)
    heading = f"{numbers['variant'].iloc[0]}: singular values over training"
    text.title(figure, heading, text.runs_note([int(numbers["runs"].max())]))
    text.fit(figure)
    return figure


def _midpoints(centres: Array) -> Array:
    """Edges half-way between the epochs; a scale may have one alone."""
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
