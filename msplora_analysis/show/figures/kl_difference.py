"""Figure 4: how far apart the layers' spectra lie under MSPLoRA, minus how far under LoRA."""

import warnings
from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd

from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables import layer_kl
from msplora_analysis.tables.matrices import choose, is_msplora, prepare, slug, stacks


def figure4(
    spectra: pd.DataFrame,
    msplora: str | None = None,
    lora: str | None = None,
    *,
    stack: str | None = None,
    epoch: float | None = None,
    style: str | None = None,
) -> Figure:
    """D_KL(i‖j) between the `layer` parts under MSPLoRA minus that under LoRA: layer i down, layer j across.

    Spectra are averaged over modules and runs first, then compared; positive (red) means that the layers differ more
    under MSPLoRA. `epoch` is the last that both methods share unless given.
    Source: MSPLoRA, arXiv 2503.21838, figure 4, eq. 9, 10.
    """
    matrices = prepare(spectra)
    stack = choose("stack", stack, stacks(matrices))
    both = layer_kl.both_methods(matrices, stack)
    msplora = choose("MSPLoRA method", msplora, list(dict.fromkeys(ours for ours, _ in both)))
    lora = choose("LoRA method", lora, [theirs for ours, theirs in both if ours == msplora])
    table = numbers(matrices, msplora, lora, stack, epoch)
    return draw(table, style, name_stack=len(stacks(matrices)) > 1)


@plots_of(figure4, order=2)
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    several = len(stacks(matrices)) > 1
    for stack in stacks(matrices):
        both = layer_kl.both_methods(matrices, stack)
        kinds = {is_msplora(method) for method in layer_kl.layers_of(matrices, stack)}
        if len(kinds) == 2 and not both:
            warnings.warn(f"no Figure 4 of {stack}: MSPLoRA and LoRA runs adapt different layers", stacklevel=2)
        for msplora, lora in both:
            stem = f"figure4_{slug(msplora)}_minus_{slug(lora)}" + (f"_{slug(stack)}" if several else "")
            table = numbers(matrices, msplora, lora, stack, epoch)
            yield Plot(stem, table, partial(draw, name_stack=several))


def numbers(matrices: pd.DataFrame, msplora: str, lora: str, stack: str, epoch: float | None = None) -> pd.DataFrame:
    """One row per ordered pair of layers: both divergences and `difference`."""
    table = layer_kl.numbers(matrices, [msplora, lora], stack, epoch)
    ours, theirs = (table[table["variant"] == method] for method in (msplora, lora))
    merged = ours.merge(theirs, on=["stack", "layer_i", "layer_j"], suffixes=("_msplora", "_lora"))
    merged["difference"] = merged["kl_msplora"] - merged["kl_lora"]
    sides = [f"{column}_{side}" for side in ("msplora", "lora") for column in ("variant", "epoch", "runs")]
    return merged[["stack", *sides, "layer_i", "layer_j", "kl_msplora", "kl_lora", "difference"]]


@styled
def draw(numbers: pd.DataFrame, style: Style, *, name_stack: bool = False) -> Figure:
    values = layer_kl.matrix(numbers, "difference")
    layers = sorted(numbers["layer_i"].unique())
    figure, axes = heatmap.square_panels(style, layers, 1)
    largest = np.nanmax(np.abs(values), initial=0) or 1
    cells = heatmap.draw_cells(axes[0], values, heatmap.colour_scale(largest, -largest), colours.DIVERGING)
    figure.colorbar(cells, ax=axes, label=LABELS["kl_difference"], aspect=25, pad=0.02)
    first = numbers.iloc[0]
    heading, runs = f"{first['variant_msplora']} − {first['variant_lora']}", [first["runs_msplora"], first["runs_lora"]]
    text.title_of_layers(figure, heading, numbers, runs, name_stack=name_stack)
    heatmap.finish_squares(figure, axes, layers)
    return figure
