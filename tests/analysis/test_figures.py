"""Figures: their numbers against plain numpy and scipy, what the artists show, and what reaches the disk."""

import re
import subprocess
import sys
import warnings
import zlib
from io import BytesIO

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from fontTools.ttLib import TTFont
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from scipy.stats import entropy, t

from msplora_analysis.errors import AnalysisError
from msplora_analysis.show import figures
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.plot import KINDS, Plot, plots_of
from msplora_analysis.show.figures import (
    draw_figures,
    plot_effective_rank_map,
    plot_effective_rank_over_epochs,
    plot_figure3,
    plot_figure4,
    plot_kl_between_layers,
    plot_m_eff_over_epochs,
    plot_rank_needed,
    plot_spectra_by_layer,
    write_figures,
)
from msplora_analysis.tables import layer_kl
from msplora_analysis.tables.matrices import prepare

GROUPS = {"global": 1, "mid": 3}


def spectra_of(
    method="lora",
    ranks=(8,),
    *,
    layers=6,
    epochs=(0, 1, 2, 3),
    tasks=("cola", "rte"),
    seeds=(0, 1),
    modules=("query", "value"),
    stack="roberta.encoder.layer",
    total=True,
):
    """A table like `load_spectra`'s: spectra decay in k, grow from 0 with the epoch, differ by task, seed and layer."""
    rng = np.random.default_rng(sum(ranks) + layers)
    parts = {"layer": ranks[0]} if method == "lora" else dict(zip(("global", "mid", "layer"), ranks, strict=True))
    if method != "lora" and total:
        parts["total"] = sum(ranks)
    runs = [f"{task}/{method}-{'-'.join(map(str, ranks))}/seed{seed}" for task in tasks for seed in seeds]
    frames = []
    for scale, rank in parts.items():
        groups = range(GROUPS.get(scale, layers))
        axes = {"run": runs, "epoch": epochs, "group": groups, "module": modules, "k": range(1, rank + 1)}
        frame = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
        matrices = (len(runs), 1, len(groups), len(modules), 1)
        decay = rng.uniform(0.2, 0.6, matrices) * np.arange(rank)
        size = rng.uniform(1, 3, matrices) * GROUPS.get(scale, 2)
        growth = 1 - np.exp(-np.array(epochs, dtype=float)[:, None, None, None] / 4)
        first = frame["group"] * layers // len(groups)
        frame["name"] = [f"{stack}.{layer}.self.{module}" for layer, module in zip(first, frame["module"], strict=True)]
        frames.append(
            frame.assign(scale=scale, step=frame["epoch"] * 10, sigma=(size * growth * np.exp(-decay)).ravel())
        )
    columns = ["run", "step", "epoch", "scale", "group", "module", "name", "k", "sigma"]
    return pd.concat(frames, ignore_index=True)[columns].astype({"step": "Int64", "epoch": "Int64", "group": "Int64"})


def everything(**options):
    return pd.concat(
        [spectra_of("lora", (8,), **options)]
        + [spectra_of("msplora", ranks, **options) for ranks in ((8, 4, 2), (8, 8, 8))],
        ignore_index=True,
    )


@pytest.fixture(scope="module")
def spectra():
    return everything()


def meshes(figure):
    return [
        m for ax in figure.axes for m in ax.collections if isinstance(m, QuadMesh) and ax.get_label() != "<colorbar>"
    ]


def mean_spectrum(table, **where):
    """Mean sigma over all that `where` leaves free, one value per k."""
    for column, value in where.items():
        table = table[table[column] == value]
    return table.groupby("k")["sigma"].mean().to_numpy()


def of_method(table, method):
    return table[table["run"].str.contains(f"/{method}/")]


# Figure 3


def test_figure3_shows_the_mean_over_runs_groups_and_modules(spectra):
    figure = plot_figure3(spectra, method="MSPLoRA 8/8/8")
    ours = of_method(spectra, "msplora-8-8-8")
    values, ratios = meshes(figure)[:3], meshes(figure)[3:]
    for mesh, ratio, scale in zip(values, ratios, ("global", "mid", "layer"), strict=True):
        shown, relative = np.asarray(mesh.get_array()), np.asarray(ratio.get_array())
        assert shown.shape == relative.shape == (8, 3)  # at epoch 0 there is nothing
        for column, epoch in enumerate((1, 2, 3)):
            expected = mean_spectrum(ours, scale=scale, epoch=epoch)
            np.testing.assert_allclose(shown[:, column], expected)
            np.testing.assert_allclose(relative[:, column], expected / expected[0])
        breadth, _ = per_matrix(ours, lambda s: np.exp(entropy(s)), scale=scale, epoch=3)
        assert mesh.axes.get_title() == f"{scale} (rank 8)\neffective rank {breadth:.1f}"


def test_figure3_panels_share_one_logarithmic_colour_scale_and_index_1_is_at_the_top(spectra):
    figure = plot_figure3(spectra, method="MSPLoRA 8/4/2")
    global_, mid, layer = meshes(figure)[:3]
    assert global_.norm is mid.norm is layer.norm
    assert isinstance(global_.norm, LogNorm)
    assert global_.norm.vmin == min(mesh.get_array().min() for mesh in (global_, mid, layer))
    assert global_.norm.vmax == max(mesh.get_array().max() for mesh in (global_, mid, layer))
    assert [np.asarray(mesh.get_array()).shape[0] for mesh in (global_, mid, layer)] == [8, 4, 2]
    for mesh in (global_, mid, layer):
        assert mesh.axes.get_ylim() == (8.5, 0.5)
    assert "rank 4" in [text.get_text() for text in mid.axes.texts]
    assert [label.get_text() for label in global_.axes.get_yticklabels()] == [str(k) for k in range(1, 9)]


def test_figure3_as_in_the_paper_is_linear_and_has_no_ratios(spectra):
    figure = plot_figure3(spectra, method="MSPLoRA 8/4/2", colour="linear")
    global_, mid, layer = meshes(figure)
    assert (global_.norm.vmin, global_.norm.vmax) == (0, max(mesh.get_array().max() for mesh in (global_, mid, layer)))
    with pytest.raises(AnalysisError, match="colour='grey': expected log or linear"):
        plot_figure3(spectra, method="MSPLoRA 8/4/2", colour="grey")


def test_figure3_shows_the_top_8_of_a_high_rank():
    figure = plot_figure3(spectra_of("msplora", (16, 12, 4)))
    assert [np.asarray(mesh.get_array()).shape[0] for mesh in meshes(figure)[:3]] == [8, 8, 4]
    assert meshes(figure)[0].axes.get_title().startswith("global (rank 16)\n")


def test_figure3_of_a_scale_with_one_epoch_is_drawn():
    spectra = spectra_of("msplora", (8, 4, 2))
    last = spectra["epoch"].max()
    figure = plot_figure3(spectra[(spectra["scale"] != "mid") | (spectra["epoch"] == last)])
    assert [np.asarray(mesh.get_array()).shape[1] for mesh in meshes(figure)][1] == 1


def test_figure3_uses_the_epochs_that_all_runs_share():
    short = spectra_of("msplora", (8, 4, 2), tasks=["mrpc"], epochs=(0, 1, 2))
    with pytest.warns(UserWarning, match=r"MSPLoRA 8/4/2: its 4 runs have different epochs; .* 2 epochs .*\(1 to 2\)"):
        figure = plot_figure3(pd.concat([short, spectra_of("msplora", (8, 4, 2), tasks=["cola"], epochs=(1, 2, 3))]))
    assert np.asarray(meshes(figure)[0].get_array()).shape == (8, 2)


# Figure 4


def layer_kl_by_hand(table, epoch, layers=6):
    rows = [mean_spectrum(table, scale="layer", epoch=epoch, group=layer) for layer in range(layers)]
    return np.array([[entropy(p, q) for q in rows] for p in rows])


@pytest.mark.parametrize("epoch", [None, 2])
def test_figure4_is_the_difference_of_kl_of_spectra_averaged_first(spectra, epoch):
    figure = plot_figure4(spectra, msplora="MSPLoRA 8/4/2", epoch=epoch)
    at = 3 if epoch is None else epoch
    expected = layer_kl_by_hand(of_method(spectra, "msplora-8-4-2"), at) - layer_kl_by_hand(
        of_method(spectra, "lora-8"), at
    )
    (mesh,) = meshes(figure)
    shown = np.asarray(mesh.get_array())
    np.testing.assert_allclose(shown, expected, atol=1e-12)
    assert (shown.diagonal() == 0).all()
    assert mesh.norm.vmin == -mesh.norm.vmax == -np.abs(shown).max()
    assert mesh.axes.get_ylim()[0] > mesh.axes.get_ylim()[1]  # layer i = 0 at the top
    assert f"epoch {at}" in figure.get_suptitle()
    assert "mean over 4 runs each" in figure.get_suptitle().replace("\n", " ")
    assert "cola, rte" in figure.get_suptitle().replace("\n", " ")
    key = "red: layers differ more under MSPLoRA 8/4/2, blue: under LoRA r=8; dots: 95 % interval over runs holds 0"
    assert figure.get_suptitle().replace("\n", " ").endswith(key)


def test_figure4_marks_the_cells_whose_interval_over_runs_holds_0(spectra):
    one_layer = (spectra["group"] == 5) & (spectra["scale"] == "layer") & (spectra["k"] > 1)
    ours = spectra["run"].str.contains("msplora-8-4-2")
    spectra = spectra.assign(sigma=spectra["sigma"].mask(one_layer & ours, 0.02 * spectra["sigma"]))
    methods = [of_method(spectra, method) for method in ("msplora-8-4-2", "lora-8")]
    without, whole = [], []
    for table in methods:
        runs = table["run"].unique()
        without.append([layer_kl_by_hand(table[table["run"] != run], 3) for run in runs])
        whole.append(layer_kl_by_hand(table, 3))
    # The jackknife's variance of each mean, n − 1 times that of the means with one run left out.
    error = np.sqrt(sum((len(each) - 1) * np.var(each, axis=0) for each in without))
    holds = np.abs(whole[0] - whole[1]) <= t.ppf(0.975, 6) * error
    (mesh,) = meshes(plot_figure4(spectra, msplora="MSPLoRA 8/4/2"))
    (dots,) = mesh.axes.lines
    marked = {(int(i), int(j)) for j, i in zip(*dots.get_data(), strict=True)}
    assert marked == {(i, j) for i, j in np.argwhere(holds) if i != j}
    assert 0 < len(marked) < 30


def test_figure4_of_one_run_each_has_no_intervals(spectra):
    one = spectra[spectra["run"].str.contains("cola/.*/seed0")]
    (mesh,) = meshes(plot_figure4(one, msplora="MSPLoRA 8/4/2"))
    assert not mesh.axes.lines
    assert "interval" not in mesh.axes.figure.get_suptitle()


def test_kl_between_layers_shows_both_on_one_colour_scale(spectra):
    figure = plot_kl_between_layers(spectra, methods=["MSPLoRA 8/8/8", "LoRA r=8"])
    ours, theirs = meshes(figure)
    np.testing.assert_allclose(
        np.asarray(ours.get_array()), layer_kl_by_hand(of_method(spectra, "msplora-8-8-8"), 3), atol=1e-12
    )
    np.testing.assert_allclose(
        np.asarray(theirs.get_array()), layer_kl_by_hand(of_method(spectra, "lora-8"), 3), atol=1e-12
    )
    assert ours.norm is theirs.norm


def test_epoch_0_has_no_spectra_to_compare(spectra):
    (mesh,) = meshes(plot_figure4(spectra, msplora="MSPLoRA 8/4/2", epoch=0))
    assert np.isnan(np.ma.filled(mesh.get_array(), np.nan)).all()


def test_summary_averages_first_and_also_tells_the_runs_apart(spectra):
    summary = layer_kl.summary(prepare(spectra)).set_index("variant")
    lora = of_method(spectra, "lora-8")
    off_diagonal = ~np.eye(6, dtype=bool)
    neighbours = np.abs(np.subtract.outer(range(6), range(6))) == 1
    first = layer_kl_by_hand(lora, 3)
    assert summary.loc["LoRA r=8", "kl_all_pairs"] == pytest.approx(first[off_diagonal].mean())
    assert summary.loc["LoRA r=8", "kl_adjacent"] == pytest.approx(first[neighbours].mean())
    each = [layer_kl_by_hand(run, 3)[off_diagonal].mean() for _, run in lora.groupby("run")]
    assert summary.loc["LoRA r=8", "kl_all_pairs_run_mean"] == pytest.approx(np.mean(each))
    assert summary.loc["LoRA r=8", "kl_all_pairs_run_std"] == pytest.approx(np.std(each, ddof=1))
    assert list(summary["runs"]) == [4, 4, 4]
    assert list(summary.index) == ["LoRA r=8", "MSPLoRA 8/4/2", "MSPLoRA 8/8/8"]
    np.testing.assert_allclose(layer_kl.per_run(prepare(lora))["kl_all_pairs"], each)


def test_variants_that_end_at_different_epochs_are_compared_at_the_last_they_share():
    table = pd.concat([spectra_of("msplora", (8, 8, 8), epochs=(0, 1, 2)), spectra_of(epochs=(0, 1, 2, 3))])
    with pytest.warns(UserWarning, match="compared at epoch 2, the last they share"):
        assert "epoch 2" in plot_figure4(table).get_suptitle()


def test_stacks_are_not_mixed(tmp_path):
    both = [
        spectra_of(method, ranks, stack=stack, layers=layers, tasks=["cola"], seeds=[0])
        for method, ranks in (("lora", (8,)), ("msplora", (8, 8, 8)))
        for stack, layers in (("t5.encoder.block", 4), ("t5.decoder.block", 3))
    ]
    table = pd.concat(both)
    names = {path.name for path in write_figures(table, tmp_path, [])}
    for kind in (
        "figure4_msplora-8-8-8_minus_lora-8",
        "kl_between_layers_msplora-8-8-8_and_lora-8",
        "spectra_by_layer_lora-8",
    ):
        assert {f"{kind}_t5-encoder-block.csv", f"{kind}_t5-decoder-block.csv"} <= names
    figure = plot_figure4(table, stack="t5.decoder.block")
    assert np.asarray(meshes(figure)[0].get_array()).shape == (3, 3)
    assert "t5.decoder.block" in figure.get_suptitle()
    with pytest.raises(AnalysisError, match=r"choose the stack .* t5\.decoder\.block, t5\.encoder\.block"):
        plot_figure4(table)


def test_no_figure4_of_variants_with_different_layers(tmp_path):
    table = pd.concat([spectra_of(layers=4), spectra_of("msplora", (8, 8, 8))])
    with pytest.warns(UserWarning, match="no Figure 4 .*different layers"):
        names = [path.name for path in write_figures(table, tmp_path, [])]
    assert {"kl_between_layers_lora-8.csv", "kl_between_layers_msplora-8-8-8.csv"} <= set(names)
    assert not any(name.startswith("figure4") for name in names)


# Lines


def lines(figure, row, column, columns):
    """Of a row of panels, one for each method of several scales: lines of the scales, then of methods of one scale."""
    return [(line.get_xdata(), line.get_ydata()) for line in figure.axes[row * columns + column].lines]


def per_matrix(table, number, **where):
    """Mean over runs of the mean over a run's matrices of `number`, and its standard deviation over runs."""
    for column, value in where.items():
        table = table[table[column] == value]
    values = table.groupby(["run", "group", "module"])["sigma"].apply(lambda s: number(s.to_numpy()))
    runs = values.groupby("run").mean()
    return runs.mean(), runs.std(ddof=1)


def test_m_eff_lines_and_bands(spectra):
    figure = plot_m_eff_over_epochs(spectra)
    lora, msplora = of_method(spectra, "lora-8"), of_method(spectra, "msplora-8-4-2")
    for row, k in enumerate((1, 2, 4)):
        share = lambda s, k=k: np.sort(s)[::-1][:k].sum() / s.sum()  # noqa: E731
        (x, y), _, layer, _, lora_ = lines(figure, 0, row, 3)
        np.testing.assert_array_equal(x, [0, 1, 2, 3])
        assert np.isnan(y[0])  # B = 0 has no spectrum
        assert y[3] == pytest.approx(per_matrix(msplora, share, scale="global", epoch=3)[0])
        of_lora, of_msplora = lora_[1], layer[1]
        mean, std = per_matrix(lora, share, scale="layer", epoch=3)
        assert of_lora[3] == pytest.approx(mean)
        assert of_msplora[3] == pytest.approx(per_matrix(msplora, share, scale="layer", epoch=3)[0])
        band = figure.axes[row].collections[-1].get_paths()[0].get_extents()
        assert band.y0 <= mean - std + 1e-9
        assert band.y1 >= mean + std - 1e-9
    assert "high = concentrated" in figure.get_suptitle()


def test_effective_rank_lines_are_relative_to_each_rank_too(spectra):
    figure = plot_effective_rank_over_epochs(spectra)
    msplora = of_method(spectra, "msplora-8-4-2")
    rank = lambda s: np.exp(entropy(s))  # noqa: E731
    expected, _ = per_matrix(msplora, rank, scale="mid", epoch=2)
    assert lines(figure, 0, 0, 2)[1][1][2] == pytest.approx(expected)
    assert lines(figure, 0, 1, 2)[1][1][2] == pytest.approx(expected / 4)
    expected, _ = per_matrix(msplora, rank, scale="total", epoch=2)
    assert lines(figure, 0, 1, 2)[3][1][2] == pytest.approx(expected / 14)
    # The same line of LoRA stands in the panels of both methods.
    np.testing.assert_array_equal(lines(figure, 0, 0, 2)[4][1], lines(figure, 1, 0, 2)[4][1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "global",
        "mid",
        "layer",
        "total",
        "LoRA r=8",
    ]
    assert "high = broad" in figure.get_suptitle()


@pytest.mark.parametrize("draw", [plot_m_eff_over_epochs, plot_effective_rank_over_epochs])
def test_lines_stay_inside_their_panels(spectra, draw):
    figure = draw(spectra)
    for ax in figure.axes:
        for line in ax.lines:
            assert np.nanmax(line.get_ydata()) <= ax.get_ylim()[1]
            assert np.nanmin(line.get_ydata()) >= ax.get_ylim()[0]


# Variants


def test_spectra_by_layer_by_hand(spectra):
    (mesh,) = meshes(plot_spectra_by_layer(spectra, method="MSPLoRA 8/4/2", epoch=1))
    expected = [mean_spectrum(of_method(spectra, "msplora-8-4-2"), scale="layer", epoch=1, group=g) for g in range(6)]
    np.testing.assert_allclose(np.asarray(mesh.get_array()), np.transpose(expected))


def test_effective_rank_map_by_hand(spectra):
    figure = plot_effective_rank_map(spectra, method="LoRA r=8")
    modules, epochs = meshes(figure)
    lora = of_method(spectra, "lora-8")
    rank = lambda s: np.exp(entropy(s))  # noqa: E731
    for row, module in enumerate(("query", "value")):
        expected, _ = per_matrix(lora, rank, module=module, group=4, epoch=3)
        assert np.asarray(modules.get_array())[row, 4] == pytest.approx(expected)
        assert f"{expected:.1f}" in {text.get_text() for text in modules.axes.texts}
    assert np.asarray(epochs.get_array()).shape == (3, 6)
    expected, _ = per_matrix(lora, rank, group=2, epoch=1)
    assert np.asarray(epochs.get_array())[0, 2] == pytest.approx(expected)


def test_modules_stand_in_the_order_of_a_model():
    modules = ["up_proj", "o_proj", "q_proj", "other", "down_proj", "v_proj", "gate_proj", "k_proj"]
    table = spectra_of(layers=2, modules=modules, epochs=(1,), tasks=["cola"], seeds=[0])
    for figure in (plot_rank_needed(table), plot_effective_rank_map(table)):
        names = [label.get_text().removesuffix("_proj") for label in figure.axes[0].get_yticklabels()]
        assert names == ["q", "k", "v", "o", "gate", "up", "down", "other"]


def test_every_epoch_is_labelled_where_all_have_room():
    for last, style, expected in ((6, None, [1, 2, 3, 4, 5, 6]), (100, None, [20, 40, 60, 80, 100])):
        table = spectra_of("msplora", (2, 2, 2), layers=2, epochs=range(last + 1), tasks=["cola"], seeds=[0])
        ax = plot_figure3(table, style=style).axes[3]
        low, high = ax.get_xlim()
        assert [tick for tick in ax.get_xticks() if low <= tick <= high] == expected


def test_no_figure_is_larger_than_a_page():
    table = everything(layers=80, epochs=(1, 2), seeds=[0], modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for figure in (
            plot_figure4(table, msplora="MSPLoRA 8/8/8"),
            plot_effective_rank_map(table, method="LoRA r=8"),
            plot_m_eff_over_epochs(table, style="acl-column"),
            plot_figure3(table, method="MSPLoRA 8/8/8", style="acl-column"),
        ):
            assert figure.get_figwidth() <= 7
            assert figure.get_figheight() <= 9


def test_ranks_that_differ_within_a_scale():
    table = spectra_of(tasks=["cola"], seeds=[0])
    table = table[(table["k"] <= 2) | (table["group"] != 0)]  # layer 0 has rank 2, the others 8
    with pytest.warns(UserWarning, match="LoRA r=2–8: layers have 2 to 8 singular values; .* 2 largest"):
        figure = plot_kl_between_layers(table)
    top = [mean_spectrum(table, scale="layer", epoch=3, group=g)[:2] for g in range(6)]
    assert np.asarray(meshes(figure)[0].get_array())[1, 0] == pytest.approx(entropy(top[1], top[0]))
    values = np.ma.filled(meshes(plot_spectra_by_layer(table))[0].get_array(), np.nan)
    assert np.isnan(values[2:, 0]).all()
    assert not np.isnan(values[:, 1:]).any()


def test_runs_of_different_models_are_not_averaged():
    other = spectra_of(tasks=["mrpc"], layers=4)
    table = pd.concat([spectra_of(tasks=["cola"]), other, spectra_of("msplora", (8, 8, 8))])
    assert list(layer_kl.summary(prepare(table))["variant"]) == [
        "LoRA r=8 (4 layers)",
        "LoRA r=8 (6 layers)",
        "MSPLoRA 8/8/8",
    ]
    # Only one of the two LoRA variants has the layers of the MSPLoRA runs.
    assert "LoRA r=8 (6 layers)" in plot_figure4(table).get_suptitle()


def test_runs_that_share_no_epoch_are_drawn_at_the_last_of_each():
    table = pd.concat([spectra_of(tasks=["cola"], epochs=[1, 2]), spectra_of(tasks=["rte"], epochs=[3, 4])])
    with pytest.warns(UserWarning, match="LoRA r=8: its 4 runs share no epoch"):
        figure = plot_spectra_by_layer(table)
    last = table[table["epoch"].isin([2, 4])]
    np.testing.assert_allclose(np.asarray(meshes(figure)[0].get_array())[:, 3], mean_spectrum(last, group=3))
    assert "last checkpoint" in figure.get_suptitle()


def test_a_copy_saved_at_the_end_has_no_place_on_the_epoch_axis():
    table = spectra_of("msplora", (8, 4, 2), tasks=["cola"], seeds=[0])
    copy = (
        table[table["epoch"] == 3]
        .assign(epoch=pd.NA, step=pd.NA, sigma=99.0)
        .astype({"epoch": "Int64", "step": "Int64"})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_figure3(pd.concat([table, copy]))
    assert meshes(figure)[0].get_array().max() < 99


# Labels


def test_long_titles_stay_inside_the_figure():
    stack = "model.vision_tower.timm_model.blocks_of_the_encoder"
    table = pd.concat([spectra_of(stack=stack, epochs=[1]), spectra_of(epochs=[1])])
    figure = plot_kl_between_layers(table, stack=stack)
    figure.draw_without_rendering()
    assert figure.get_tightbbox().x0 >= 0
    assert figure.get_tightbbox().x1 <= figure.get_figwidth()


# On disk


@pytest.mark.slow
def test_write_figures_writes_all_that_the_table_allows(tmp_path):
    few = {"layers": 3, "tasks": ["cola"], "epochs": (0, 1)}
    small = pd.concat([spectra_of("lora", (8,), **few), spectra_of("msplora", (8, 4, 2), **few)])
    before = small.copy(deep=True)
    settings = dict(mpl.rcParams)
    written = write_figures(small, tmp_path / "first", ["pdf", "png", "svg"])
    stems = [
        "figure3_msplora-8-4-2",
        "figure4_msplora-8-4-2_minus_lora-8",
        "kl_between_layers_msplora-8-4-2_and_lora-8",
        "m_eff_over_epochs",
        "effective_rank_over_epochs",
        "effective_rank_map_lora-8",
        "effective_rank_map_msplora-8-4-2",
        "spectra_by_layer_lora-8",
        "spectra_by_layer_msplora-8-4-2",
        "rank_needed_lora-8",
        "rank_needed_msplora-8-4-2",
    ]
    expected = {f"{stem}.{suffix}" for stem in stems for suffix in ("csv", "pdf", "png", "svg")}
    tables = {"kl_summary.csv", "kl_per_run.csv", "figure4_msplora-8-4-2_minus_lora-8_intervals.csv"}
    assert {path.name for path in written} == expected | tables
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == sorted(path.name for path in written)

    # The same bytes again, whatever the user's own settings and the order of the columns.
    with mpl.rc_context({"font.size": 20, "savefig.bbox": "tight", "image.cmap": "jet", "pdf.fonttype": 3}):
        again = write_figures(small[small.columns[::-1]], tmp_path / "second", ["pdf"])
    assert {two.name for two in again} == {one.name for one in written if one.suffix in (".csv", ".pdf")}
    for two in again:
        assert two.read_bytes() == (tmp_path / "first" / two.name).read_bytes(), two.name

    pd.testing.assert_frame_equal(small, before)
    assert dict(mpl.rcParams) == settings
    pdf = (tmp_path / "first/figure4_msplora-8-4-2_minus_lora-8.pdf").read_bytes()
    assert b"CreationDate" not in pdf
    fonts = [set(TTFont(BytesIO(font)).keys()) for font in streams(pdf, b"/Length1")]  # TrueType
    assert fonts
    assert all("glyf" in tables and not {"GSUB", "GPOS"} & tables for tables in fonts)
    svg = (tmp_path / "first/figure3_msplora-8-4-2.svg").read_text()
    assert ">epoch</text>" in svg


def streams(pdf, key):
    """What the streams of a PDF hold whose dictionary has the key."""
    heads = [match for match in re.finditer(rb"<<[^>]*>>\nstream\n", pdf) if key in match[0]]
    return [zlib.decompress(pdf[head.end() : pdf.index(b"\nendstream", head.end())]) for head in heads]


def test_csv_holds_the_numbers_of_the_figure(tmp_path, spectra):
    write_figures(spectra, tmp_path, [])
    figure3_ = pd.read_csv(tmp_path / "figure3_msplora-8-4-2.csv", float_precision="round_trip")
    assert figure3_.columns.tolist() == ["variant", "scale", "epoch", "k", "sigma", "rank", "runs", "matrices"]
    ours = of_method(spectra, "msplora-8-4-2")
    for (scale, epoch), rows in figure3_.groupby(["scale", "epoch"]):
        np.testing.assert_allclose(rows["sigma"], mean_spectrum(ours, scale=scale, epoch=epoch))
    assert figure3_.groupby("scale")["matrices"].first().to_dict() == {"global": 8, "mid": 24, "layer": 48}

    figure4_ = pd.read_csv(tmp_path / "figure4_msplora-8-4-2_minus_lora-8.csv", float_precision="round_trip")
    square = figure4_.pivot(index="layer_i", columns="layer_j", values="difference").to_numpy()
    (mesh,) = meshes(plot_figure4(spectra, msplora="MSPLoRA 8/4/2"))
    np.testing.assert_allclose(square, np.asarray(mesh.get_array()), rtol=1e-14)
    assert set(figure4_["epoch_lora"]) == {3}

    summary = pd.read_csv(tmp_path / "kl_summary.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(summary, layer_kl.summary(prepare(spectra)), check_dtype=False)


def test_a_single_adapter_is_drawn_without_epochs(tmp_path):
    table = spectra_of(epochs=[5], tasks=["cola"], seeds=[0]).assign(epoch=pd.NA, step=pd.NA)
    names = sorted(path.name for path in write_figures(table, tmp_path, ["png"]))
    drawn = ["effective_rank_map_lora-8", "kl_between_layers_lora-8", "rank_needed_lora-8", "spectra_by_layer_lora-8"]
    assert names == sorted(
        [f"{stem}.{s}" for stem in drawn for s in ("csv", "png")] + ["kl_per_run.csv", "kl_summary.csv"]
    )


def test_without_lora_there_is_no_figure4(tmp_path):
    table = spectra_of("msplora", (8, 8, 8), tasks=["cola"], seeds=[0], total=False)
    names = [path.name for path in write_figures(table, tmp_path, [])]
    assert not any(name.startswith("figure4") for name in names)
    assert {"figure3_msplora-8-8-8.csv", "kl_between_layers_msplora-8-8-8.csv"} <= set(names)


def test_modules_outside_numbered_layers_count_over_epochs_only(tmp_path):
    table = spectra_of(tasks=["cola"], seeds=[0], layers=1).assign(group=pd.NA, name="classifier.dense")
    names = {path.name for path in write_figures(table, tmp_path, [])}
    assert names == {"m_eff_over_epochs.csv", "effective_rank_over_epochs.csv"}


def test_a_failed_write_leaves_no_file_behind(tmp_path, monkeypatch, spectra):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_figures(spectra, tmp_path, ["png"])
    assert list(tmp_path.iterdir()) == []


# Errors


def test_unknown_format_lists_the_valid_ones(tmp_path, spectra):
    with pytest.raises(AnalysisError, match="unknown figure format 'jpg': choose from pdf, png, svg"):
        write_figures(spectra, tmp_path / "out", ["png", "jpg"])
    assert not (tmp_path / "out").exists()


def test_nothing_to_draw_says_what_is_needed(tmp_path):
    table = spectra_of(epochs=[1]).assign(group=pd.NA, name="classifier.dense")
    table = table.drop_duplicates(["run", "module", "k"])
    with pytest.raises(
        AnalysisError, match=r"nothing to draw: figures need .* two or more epochs, or .* numbered layers"
    ):
        write_figures(table, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_tables(tmp_path, spectra):
    with pytest.raises(AnalysisError, match="lacks the column sigma"):
        write_figures(spectra.drop(columns="sigma"), tmp_path)
    with pytest.raises(AnalysisError, match="is empty"):
        write_figures(spectra.iloc[:0], tmp_path)
    with pytest.raises(AnalysisError, match=r"run cola/lora-8/seed0 holds .*self\.query \(layer\) twice"):
        write_figures(pd.concat([spectra, spectra.iloc[:1]]), tmp_path)
    with pytest.raises(AnalysisError, match="only the scale total"):
        write_figures(spectra[spectra["scale"] == "total"], tmp_path)


def test_what_to_draw_must_be_told_where_there_is_a_choice(spectra):
    with pytest.raises(AnalysisError, match=r"choose the method .*none was given.*: MSPLoRA 8/4/2, MSPLoRA 8/8/8"):
        plot_figure3(spectra)
    with pytest.raises(AnalysisError, match=r"not 'LoRA r=8'"):
        plot_figure3(spectra, method="LoRA r=8")
    with pytest.raises(AnalysisError, match=r"epoch 7 is not there for all runs of .*: choose one of 0, 1, 2, 3"):
        plot_figure4(spectra, msplora="MSPLoRA 8/8/8", epoch=7)
    with pytest.raises(AnalysisError, match="adapt different layers"):
        plot_kl_between_layers(
            pd.concat([spectra_of(layers=4), spectra_of("msplora", (8, 8, 8))]),
            methods=["LoRA r=8", "MSPLoRA 8/8/8"],
        )


def test_no_pyplot_and_no_seaborn():
    code = (
        "import sys, msplora_analysis.show.figures; print('matplotlib.pyplot' in sys.modules, 'seaborn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == [
        "False",
        "False",
    ]


# A figure of one's own


def test_a_figure_declares_itself_and_is_written_with_the_others(tmp_path, spectra, monkeypatch):
    monkeypatch.setitem(KINDS, "largest_values", None)  # taken away at the end

    def largest_values(table):
        return draw(table, None)

    @plots_of(largest_values, order=0)
    def plots(matrices, epoch=None):
        yield Plot("largest_values", matrices[["run", "epoch"]].assign(sigma=matrices[1]), draw)

    def draw(numbers, style):
        figure = Figure()
        figure.subplots().plot(numbers["epoch"], numbers["sigma"], ".")
        return figure

    paths = write_figures(spectra, tmp_path, ["svg"])
    assert [path.name for path in paths[:3]] == [
        "largest_values.csv",
        "largest_values.svg",
        "figure3_msplora-8-4-2.csv",
    ]
    assert len(pd.read_csv(paths[0])) == spectra.groupby(["run", "epoch", "scale", "name"]).ngroups
    assert list(draw_figures(spectra, which="largest_values")) == ["largest_values"]
    assert figures.largest_values is largest_values
