"""What carries the task: what a model loses without each module, layer, type and scale of its adapter."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from msplora_analysis.formats.names import in_model_order, module_of, stack_and_layer
from msplora_analysis.show.drawing import colours, heatmap, text
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.labels import LABELS
from msplora_analysis.show.drawing.plot import Plot, plots_of
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style
from msplora_analysis.tables.ablation import adapter_name, each_adapter, kl_label, metric_label, one_adapter
from msplora_analysis.tables.matrices import choose, slug

LETTERS = 20  # of a module's name on one line
_OTHERS = {"type": "without the type", "scale": "without the scale", "only_scale": "the scale alone"}


def plot_what_carries(
    ablation: pd.DataFrame,
    *,
    run: str | None = None,
    step: int | None = None,
    stack: str | None = None,
    style: str | None = None,
) -> Figure:
    """What is lost without each part: the KL of leaving out a module as a map, the change of the metric as points.

    Points have 95 % intervals over examples, and are filled where these exclude 0. The table is that of
    `load_ablation`; `run`, `step` and `stack` (of numbered layers) choose where it has several.

    Example:
        >>> ma.plot_what_carries(ma.load_ablation("runs/cola"))
    """
    chosen = one_adapter(ablation, run, step)
    return draw(numbers(chosen, choose("stack", stack, _stacks(chosen))), style)


@plots_of(plot_what_carries, order=11, needs="ablation", name="what_carries")
def plots(ablation: pd.DataFrame, epoch: float | None = None) -> Iterator[Plot]:
    for name, table in each_adapter(ablation):
        stacks = _stacks(table)
        for stack in stacks:
            stem = "_".join(filter(None, ["what_carries", slug(name), slug(stack) if len(stacks) > 1 else ""]))
            of = ", ".join(filter(None, [name, stack if len(stacks) > 1 else ""]))
            yield Plot(stem, numbers(table, stack), draw, of)


def _stacks(ablation: pd.DataFrame) -> list[str]:
    """The stacks of numbered layers, in the order of the model."""
    layers = ablation.loc[ablation["cut"] == "layer", "what"]
    return list(dict.fromkeys(stack_and_layer(what)[0] for what in layers))


def numbers(ablation: pd.DataFrame, stack: str) -> pd.DataFrame:
    """One row for each module and layer of the stack, type and scale: what it costs to leave it out, or all others."""
    table = ablation[ablation["cut"].isin(["module", "layer", *_OTHERS])]
    places = [stack_and_layer(what) if cut in ("module", "layer") else ("", None) for cut, what in _cuts(table)]
    modules = [module_of(what) if cut == "module" else None for cut, what in _cuts(table)]
    table = table.assign(
        stack=[place for place, _ in places],
        layer=pd.array([layer for _, layer in places], "Int64"),
        module=np.array(modules, dtype=object),
        metric_name=metric_label(ablation),
    )
    columns = ["run", "step", "metric_name", "cut", "what", "stack", "layer", "module"]
    measured = ["kl", "predicted_kl", "metric_change", "low", "high"]
    return table.loc[table["stack"].isin([stack, ""]), columns + measured].reset_index(drop=True)


def _cuts(table: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(table["cut"], table["what"], strict=True))


@styled
def draw(numbers: pd.DataFrame, style: Style) -> Figure:
    of_modules = numbers[numbers["cut"] == "module"]
    kl = of_modules.pivot_table(index="module", columns="layer", values="kl", sort=False)
    layers = sorted(set(numbers["layer"].dropna()))
    kl = kl.reindex(index=in_model_order(kl.index), columns=layers)
    names = [text.broken(module, LETTERS) for module in kl.index]
    metric = numbers["metric_name"].iloc[0]
    longest = min(max(map(len, kl.index)), LETTERS)
    width = max(heatmap.width_for(style, len(layers), beside=0.05 * longest), style.widest)
    height = 0.2 + 0.14 * max(name.count("\n") + 1 for name in names) * len(names)
    others = {cut: numbers[numbers["cut"] == cut] for cut in _OTHERS if (numbers["cut"] == cut).any()}
    shares = [len(rows) + 0.5 for rows in others.values()]
    crowded = 0.065 * max(rows["what"].str.len().max() for rows in others.values()) > (width - 0.9) / sum(shares)
    figure = Figure(figsize=(width, 4.6 + height + 0.7 * crowded), layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=[height, 1.5, 1.5 + 0.4 * crowded])
    map_, bars = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    norm = heatmap.colour_scale(float(np.nanmax(kl.to_numpy(np.float64))))
    cells = heatmap.draw_cells(map_, kl.to_numpy(np.float64), norm, colours.SEQUENTIAL)
    map_.set_yticks(range(len(names)), names, parse_math=False)
    map_.set_title("without the module")
    figure.colorbar(cells, ax=map_, label=kl_label(metric).replace(" an example", ""), aspect=8, pad=0.02)
    _points(bars, numbers[numbers["cut"] == "layer"].set_index("layer").reindex(layers))
    bars.set(title="without the layer", ylabel="\n".join(["change of", *metric.split()]), xlabel=LABELS["layer"])
    panels = grid[2].subgridspec(1, len(others), width_ratios=shares).subplots(sharey=True, squeeze=False)[0]
    for ax, (cut, rows) in zip(panels, others.items(), strict=True):
        _points(ax, rows)
        ax.set_xticks(range(len(rows)), [text.broken(what, LETTERS) for what in rows["what"]], parse_math=False)
        ax.tick_params(axis="x", labelrotation=90 if crowded else 0)
        ax.set_title(_OTHERS[cut])
    panels[0].set_ylabel("change")
    text.title(figure, f"What carries the task: {adapter_name(numbers)}", "95 % intervals; filled: excludes 0")
    text.fit(figure)
    heatmap.label_layers(figure, [map_.xaxis, bars.xaxis], [int(layer) for layer in layers])
    most = float(np.nanmax(kl.to_numpy(np.float64), initial=0))
    digits = max(0, 1 - math.floor(math.log10(most))) if most > 0 else 0
    heatmap.write_numbers(cells, kl.to_numpy(np.float64), f"{{:.{digits}f}}")
    return figure


def _points(ax: Axes, rows: pd.DataFrame) -> None:
    """The change of the metric of each row, with its interval."""
    x = np.arange(len(rows))
    change, low, high = (rows[name].to_numpy(np.float64) for name in ("metric_change", "low", "high"))
    ax.axhline(0, color="0.6", linewidth=0.6)
    ax.vlines(x, low, high, color=colours.PALETTE[0], linewidth=1)
    sure = (low > 0) | (high < 0)
    for chosen, face in ((sure, colours.PALETTE[0]), (~sure, "white")):
        ax.plot(x[chosen], change[chosen], "o", color=colours.PALETTE[0], markerfacecolor=face, markersize=4)
    ax.set_xlim(-0.5, len(rows) - 0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.locator_params(axis="y", nbins=5)
