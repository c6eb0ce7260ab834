"""Tables of any number of layers for each kind of figure, and a check that its texts have room."""

from functools import cache, partial
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_figures import spectra_of

from msplora_analysis.show import figures

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pairs_of(layers, *, epochs=(0, 1), modules=("query", "value"), stack="roberta.encoder.layer"):
    """Like `load_pairs(details=True)` of one LoRA run: near layers share more."""
    rng = np.random.default_rng(layers)
    rows = []
    for epoch in epochs:
        for module in modules:
            i, j = np.triu_indices(layers, 1)
            near = np.exp(-(j - i) / 4) * rng.uniform(0.7, 1, len(i))
            names = [f"{stack}.{layer}.self.{module}" for layer in i]
            columns = {"kl_ij": 0.3 - 0.2 * near, "kl_ji": 0.28 - 0.2 * near, "js": 0.1, "wasserstein": 0.1}
            columns |= {"overlap_in": 0.01 + 0.2 * near, "overlap_out": 0.02 + 0.1 * near, "overlap_expected": 0.0104}
            columns |= {"expected_in": 0.0104, "expected_out": 0.0208, "cosine": 0.1 * near, "name_i": names}
            about = {"run": "cola/lora-8/seed0", "step": 10 * epoch, "epoch": epoch, "scale": "layer", "module": module}
            rows.append(pd.DataFrame(about | columns | {"group_i": i, "group_j": j}))
    return pd.concat(rows, ignore_index=True)


def scale_pairs_of(layers, *, epochs=(0, 1, 2, 3)):
    """Like `load_scale_pairs(details=True)` of two MSPLoRA runs: overlaps fall with the epoch."""
    rows = []
    for seed, (one, other) in [(s, p) for s in range(2) for p in combinations(("global", "mid", "layer"), 2)]:
        for epoch in epochs:
            about = {"run": f"cola/msplora-8-4-2/seed{seed}", "step": 10 * epoch, "epoch": epoch, "module": "query"}
            measures = {"kl_ij": 0.1, "kl_ji": 0.1, "js": 0.1, "wasserstein": 0.1, "overlap_expected": 0.01}
            measures |= {
                "overlap_in": 0.3 / (1 + epoch) + 0.02 * seed,
                "overlap_out": 0.2 / (1 + epoch),
                "cosine": 0.05,
            }
            groups = {"group_i": 0, "group_j": np.arange(layers), "scale_i": one, "scale_j": other}
            rows.append(pd.DataFrame(about | measures | groups))
    return pd.concat(rows, ignore_index=True)


def comparison_table():
    """Like `compare`'s: differences of all measures with their intervals."""
    rows = [
        {"question": "difference", "measure": measure, "pairs": pairs, "estimate": 0.0021 * sign, "low": -0.0012,
         "high": 0.0042, "decided": sign < 0, "a": "MSPLoRA 8/4/2", "b": "LoRA r=8", "confidence": 0.95,
         "n_a": 9, "n_b": 9, "k_a": 14, "k_b": 8}
        for measure in ("kl", "kl_matched", "overlap_in", "overlap_out")
        for pairs, sign in (("all", 1), ("adjacent", -1))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def ablation_of(layers, *, modules=("query", "value"), stack="roberta.encoder.layer", run="cola", step=268):
    """Like `load_ablation` of one MSPLoRA adapter with moments: later layers carry more."""
    rng = np.random.default_rng(layers)
    names = [f"{stack}.{layer}.self.{module}" for layer in range(layers) for module in modules]
    cuts = [("none", "adapter", None)] + [("module", name, None) for name in names]
    cuts += [("layer", f"{stack}.{layer}", None) for layer in range(layers)] + [("type", m, None) for m in modules]
    cuts += [("scale", scale, None) for scale in ("global", "mid", "layer", "total")]
    cuts += [("only_scale", scale, None) for scale in ("global", "mid", "layer")]
    cuts += [(cut, "adapter", rank) for cut in ("rank", "rank_task") for rank in (1, 2, 4)]
    table = pd.DataFrame(cuts, columns=["cut", "what", "rank"]).astype({"rank": "Int64"})
    kl = np.r_[0, np.geomspace(1e-5, 0.3, len(table) - 1)]
    change = -0.5 * kl**0.5
    table["parameters"] = 1000
    table["metric"], table["metric_change"] = 0.5 + change, change
    width = np.r_[0, rng.uniform(0.01, 0.05, len(table) - 1)]
    table["low"], table["high"] = change - width, change + width
    table["kl"], table["predicted_kl"], table["loss"] = kl, kl * rng.uniform(0.4, 2.2, len(table)), 0.5 + kl
    about = {"run": run, "step": pd.array([step] * len(table), "Int64"), "task": "cola"}
    return pd.DataFrame(about | {"metric_name": "matthews_correlation"}).join(table)


def relations_of(layers, adapters=8):
    """Like `relate` of adapters of two tasks; of two adapters where there are many layers."""
    rng = np.random.default_rng(layers)
    names = [f"runs/task-{i % 2}/seed-{i // 2}" for i in range(adapters if layers < 32 else 2)]
    rows = []
    for i, j in combinations(range(len(names)), 2):
        for name in (*(f"model.layers.{k}.self_attn.{m}" for k in range(layers) for m in ("q_proj", "v_proj")), ""):
            cosine = 0.25 * ((j - i) % 2 == 0) + rng.normal(scale=0.03)
            overlap_in, overlap_out = 0.02 + 0.1 * rng.random(2)
            rows.append((names[i], names[j], name.rpartition(".")[2] or "all", name, cosine, overlap_in, overlap_out))
    table = pd.DataFrame(rows, columns=["a", "b", "module", "name", "cosine", "overlap_in", "overlap_out"])
    return table.assign(expected_in=0.02, expected_out=0.02)


@cache
def tables(layers):
    """Spectra of LoRA and MSPLoRA, two seeds; those of a LoRA run of seven modules."""
    few = {"layers": layers, "epochs": (0, 1, 2) if layers < 80 else (1, 2), "tasks": ["cola"], "seeds": [0, 1]}
    both = [spectra_of("lora", (8,), **few), spectra_of("msplora", (8, 4, 2), **few)]
    many = spectra_of("lora", (4,), layers=layers, epochs=(2,), tasks=["cola"], seeds=[0], modules=MODULES)
    return pd.concat(both, ignore_index=True), many


KINDS = {
    "figure3": lambda layers: partial(figures.plot_figure3, tables(layers)[0]),
    "figure4": lambda layers: partial(figures.plot_figure4, tables(layers)[0]),
    "kl_between_layers": lambda layers: partial(
        figures.plot_kl_between_layers, tables(layers)[0], methods=["MSPLoRA 8/4/2", "LoRA r=8"]
    ),
    "m_eff_over_epochs": lambda layers: partial(figures.plot_m_eff_over_epochs, tables(layers)[0]),
    "effective_rank_over_epochs": lambda layers: partial(figures.plot_effective_rank_over_epochs, tables(layers)[0]),
    "effective_rank_map": lambda layers: (
        partial(figures.plot_effective_rank_map, tables(layers)[0], method="LoRA r=8")
        if layers < 80
        else partial(figures.plot_effective_rank_map, tables(layers)[1])
    ),
    "spectra_by_layer": lambda layers: partial(figures.plot_spectra_by_layer, tables(layers)[0], method="LoRA r=8"),
    "rank_needed": lambda layers: partial(figures.plot_rank_needed, tables(layers)[1]),
    "overlap_between_layers": lambda layers: partial(figures.plot_overlap_between_layers, pairs_of(layers)),
    "decoupling_over_epochs": lambda layers: partial(figures.plot_decoupling_over_epochs, scale_pairs_of(layers)),
    "what_carries": lambda layers: partial(
        figures.plot_what_carries, ablation_of(layers, modules=MODULES if layers < 80 else MODULES[:2])
    ),
    "metric_against_rank": lambda layers: partial(figures.plot_metric_against_rank, ablation_of(layers)),
    "predicted_against_measured": lambda layers: partial(figures.plot_predicted_against_measured, ablation_of(layers)),
    "relations": lambda layers: partial(figures.plot_relations, relations_of(layers)),
    "comparison": lambda layers: partial(figures.plot_comparison, comparison_table()),
}


def draw(kind: str, layers: int, style: str | None) -> Figure:
    return KINDS[kind](layers)(style=style)


def check_texts(figure: Figure) -> None:
    """No text overlaps another or a panel beside its own, leaves the canvas, or is smaller than 6 points."""
    figure.draw_without_rendering()
    ticks, shown = set(), []
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                ticks |= {tick.label1, tick.label2}
                if low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    shown.append(tick.label1)
    shown += [text for text in figure.findobj(Text) if text not in ticks]
    shown = [text for text in shown if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in shown) >= 6

    boxes = [text.get_window_extent() for text in shown]
    for text, box in zip(shown, boxes, strict=True):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text.get_text()!r} leaves the canvas: {box}"
    names = [text.get_text() for text in shown]
    outside = [text.axes is None or text not in text.axes.texts for text in shown]  # of panels, not on them
    for ax in figure.axes:
        boxes.append(ax.get_window_extent())
        names.append(f"panel {ax.get_title()!r}")
    for legend in figure.legends:
        boxes.append(legend.get_window_extent())
        names.append("legend")
    x0, y0, x1, y1 = np.array([box.extents for box in boxes]).T
    slack = 0.5  # pixels
    across = (x0[:, None] < x1 - slack) & (x0 < x1[:, None] - slack)
    down = (y0[:, None] < y1 - slack) & (y0 < y1[:, None] - slack)
    allowed = np.zeros(across.shape, dtype=bool)
    panels = slice(len(shown), len(shown) + len(figure.axes))
    allowed[: len(shown), panels] = ~np.array(outside)[:, None]
    allowed[: len(shown), panels.stop :] = True  # a legend's own texts
    over = np.argwhere(np.triu(across & down & ~allowed, 1))
    assert not len(over), [(names[i], names[j]) for i, j in over[:5]]


def labelled_layers(axis: Axis, layers: int) -> int:
    """Every how many-th layer is labelled, once it is seen that these are regular and the others have small ticks."""
    labels = [int(label.get_text()) for label in axis.get_majorticklabels()]
    step = labels[1] - labels[0]
    assert labels == list(range(0, layers, step))
    assert sorted({*axis.get_majorticklocs(), *axis.get_minorticklocs()}) == list(range(layers))
    return step
