"""Rank-needed map: how many directions hold most of each layer's update, module by module."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from msplora_analysis.compute.measures.rank_needed import energy_rank
from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, each_method, of_one_method, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.checkpoints import at_epoch
from msplora_analysis.tables.matrices import prepare, sigma

SHARES = (0.9, 0.99)
LETTERS = 20  # of a module's name on one line


def rank_needed_map(
    spectra: pd.DataFrame,
    method: str | None = None,
    *,
    stack: str | None = None,
    epoch: float | None = None,
    style: str | None = None,
) -> Figure:
    """The number of directions that hold 90 % and 99 % of the energy (sum of sigma²): modules down, layers across.

    Computed per matrix of the `layer` scale, then averaged over runs. It describes the rank that an update used; that
    a task needs no more is not shown by it.
    """
    return of_one_method(prepare(spectra), method, stack, epoch, numbers, draw, style)


@plots_of(rank_needed_map, order=7, name="rank_needed")
def plots(matrices: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    plots = each_method("rank_needed", matrices, numbers, draw, epoch)
    return (plot for plot in plots if plot.numbers["rank_needed"].notna().any())


def numbers(matrices: pd.DataFrame, method: str, stack: str, epoch: float | None = None) -> pd.DataFrame:
    """One row per share of the energy, module and layer: `rank_needed` (mean over runs), its share of the `rank`."""
    chosen = matrices[(matrices["variant"] == method) & (matrices["scale"] == "layer") & (matrices["stack"] == stack)]
    parts = at_epoch(chosen, epoch)
    by = ["module", "group"]
    tables = []
    for share in SHARES:
        means = parts.assign(rank_needed=energy_rank(sigma(parts), share)).groupby(by, sort=False)
        table = means.agg(rank_needed=("rank_needed", "mean"), rank=("rank", "max"), runs=("run", "nunique"))
        tables.append(table.reset_index().rename(columns={"group": "layer"}).assign(energy=share))
    table = pd.concat(tables, ignore_index=True).assign(variant=method, stack=stack)
    known = parts["epoch"].unique()
    table["epoch"] = known[0] if len(known) == 1 else np.nan
    columns = ["variant", "stack", "epoch", "runs", "energy", "module", "layer", "rank", "rank_needed"]
    return table[columns].sort_values(["energy", "module", "layer"], ignore_index=True)


@styled
def draw(numbers: pd.DataFrame, style: Style, *, name_stack: bool = False) -> Figure:
    layers = sorted(numbers["layer"].unique())
    modules = sorted(numbers["module"].unique())
    shares = sorted(numbers["energy"].unique())
    rank = int(numbers["rank"].max())
    longest = max(map(len, modules))
    width = heatmap.width_for(style, len(layers), beside=0.05 * min(longest, LETTERS))
    names = [text.broken(module, LETTERS) for module in modules]
    row = 0.05 + 0.12 * max(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(width, 0.7 + len(shares) * (0.5 + row * len(modules))), layout="constrained")
    axes = figure.subplots(len(shares), 1, squeeze=False)[:, 0]
    norm = heatmap.colour_scale(max(rank, 2), lowest=1)
    for ax, share in zip(axes, shares, strict=True):
        panel = numbers[numbers["energy"] == share].pivot(index="module", columns="layer", values="rank_needed")
        values = panel.reindex(index=modules, columns=layers).to_numpy(dtype=np.float64)
        cells = heatmap.draw_cells(ax, values, norm, colours.SEQUENTIAL)
        ax.set_yticks(range(len(modules)), names, parse_math=False)
        ax.set_title(f"{share:.0%} of the energy")
    axes[-1].set_xlabel(LABELS["layer"])
    figure.colorbar(cells, ax=axes.tolist(), label=f"{LABELS['rank_needed']}, of {rank}", aspect=25, pad=0.02)
    first = numbers.iloc[0]
    heading = f"{first['variant']}, layer parts: rank used"
    text.title_of_layers(figure, heading, numbers, [int(numbers["runs"].max())], name_stack=name_stack)
    heatmap.label_layers(figure, [ax.xaxis for ax in axes], layers)
    return figure
