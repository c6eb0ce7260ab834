"""Styles of venues, figures that are returned, names that do harm, and bytes that never change."""

import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from figure_cases import check_texts, comparison_table, draw, pairs_of, tables
from matplotlib.figure import Figure
from test_cli import run
from test_figures import meshes, spectra_of

import msplora_analysis as ma
from msplora_analysis.show import figures
from msplora_analysis.show.drawing.plot import Plot, all_plots
from msplora_analysis.show.drawing.style import SERIF, SETTINGS
from msplora_analysis.show.drawing.venues import VENUES, style_of
from msplora_analysis.show.figures.singular_values import draw as draw_figure3
from msplora_analysis.show.figures.singular_values import numbers as numbers_of_figure3
from msplora_analysis.tables import layer_kl
from msplora_analysis.tables.matrices import prepare, stacks

EXAMPLES = Path(__file__).parents[2] / "examples" / "runs"


# Styles


@pytest.mark.parametrize(
    ("venue", "kit"),
    [
        ("aaai", "aaai2024"), ("aistats", "aistats2025"), ("colm", "colm2026"), ("cvpr", "cvpr2024"),
        ("eccv", "eccv2024"), ("iclr", "iclr2024"), ("icml", "icml2024"), ("jmlr", "jmlr2001"),
        ("neurips", "neurips2024"), ("tmlr", "tmlr2023"), ("uai", "uai2023"),
    ],
)  # fmt: skip
def test_widths_are_those_of_tueplots(venue, kit):
    figsizes = pytest.importorskip("tueplots.figsizes")
    for width, suffix in (("column", "_half"), ("full", "_full")):
        theirs = getattr(figsizes, kit, None) or getattr(figsizes, kit + suffix)
        assert style_of(f"{venue}-{width}").widths == pytest.approx((theirs()["figure.figsize"][0],))


def test_a_venue_without_a_width_leaves_the_choice_to_the_figure():
    assert style_of("icml").widths == (3.25, 5.0, 6.75)
    assert style_of("NeurIPS").widths == (0.6 * 5.5, 5.5)
    narrow, wide = (draw("spectra_by_layer", layers, "icml").get_figwidth() for layers in (12, 80))
    assert (narrow, wide) == (3.25, 6.75)


def test_venues_without_a_kit_in_tueplots():
    assert {"acl", "acm", "ieee"} <= set(VENUES)
    assert style_of("acl-column").widths == pytest.approx(((16 / 2.54 - 0.6 / 2.54) / 2,), abs=0.005)
    assert style_of("acm-full").widths == pytest.approx((506.295 / 72.27,), abs=0.005)
    assert style_of("ieee-column").widths == (3.5,)


@pytest.mark.parametrize("name", ["nature", "icml-half", "icml-", "", "-column", "icml-column-full"])
def test_an_unknown_style_is_one_line_with_those_there_are(name):
    with pytest.raises(
        ma.AnalysisError, match=r"unknown style .*: choose one of aaai, acl, .*-column or -full"
    ) as error:
        figures.plot_figure3(tables(12)[0], style=name)
    assert "\n" not in str(error.value)


def test_letters_come_with_matplotlib():
    brought = str(Path(mpl.get_data_path()))
    for settings in (SETTINGS, SERIF):
        for family in settings["font.family"]:
            font = mpl.font_manager.findfont(family, fallback_to_default=False)
            assert font.startswith(brought)
    figure = draw("figure3", 12, "neurips")
    assert figure.axes[0].title.get_fontfamily() == ["STIXGeneral", "DejaVu Sans"]
    assert draw("figure3", 12, None).axes[0].title.get_fontfamily() == ["DejaVu Sans"]


def test_commands_take_a_style(tmp_path, capsys, monkeypatch):
    spectra_of(layers=3, epochs=(1,), tasks=["cola"], seeds=[0]).to_csv(tmp_path / "spectra.csv", index=False)
    options = ["--out", tmp_path, "--format", "svg", "--style"]
    status, _, error = run(capsys, monkeypatch, "figures", tmp_path / "spectra.csv", *options, "acl-column")
    assert (status, error) == (0, "")
    svg = (tmp_path / "spectra_by_layer_lora-8.svg").read_text()
    assert f'width="{72 * 3.03:g}pt"' in svg
    assert "STIXGeneral" in svg
    status, out, error = run(capsys, monkeypatch, "figures", "nowhere", *options, "vogue")
    assert (status, out, error.count("\n")) == (1, "", 1)
    assert error.startswith("error: unknown style 'vogue': choose one of ")
    arguments = ["compare", "nowhere", "--with", "nowhere", "--out", tmp_path, "--style", "acl"]
    assert run(capsys, monkeypatch, *arguments) == (
        1, "", "error: --style is that of a figure: add --figure pdf, png or svg\n"
    )  # fmt: skip


def test_figures_name_adapters_that_were_written_from_others(tmp_path, capsys, monkeypatch):
    shutil.copytree(EXAMPLES / "lora-8", tmp_path / "runs" / "lora-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ma.compress(EXAMPLES / "lora-8" / "checkpoint-270", tmp_path / "runs" / "small", rank=2)
    arguments = ["figures", tmp_path / "runs", "--out", tmp_path / "out", "--format", "svg", "--workers", "1"]
    status, _, error = run(capsys, monkeypatch, *arguments)
    assert status == 0
    assert "1 of 8 adapters were written from others" in error
    assert str(tmp_path / "runs" / "small") in error


@pytest.mark.slow
def test_cells_too_small_for_dots_are_pale():
    matrices = prepare(tables(80)[0])
    ends = layer_kl.intervals(matrices, "MSPLoRA 8/4/2", "LoRA r=8", *stacks(matrices))
    chance = (ends["low"] <= 0) & (ends["high"] >= 0) & (ends["layer_i"] != ends["layer_j"])
    (cells,) = meshes(draw("figure4", 80, "acl-column"))
    assert (cells.get_alpha() < 1).sum() == chance.sum() > 0


def test_labels_of_ticks_that_would_touch_are_thinned():
    table = comparison_table()
    far = table.assign(estimate=table["estimate"] / 5 - 0.0001, low=-0.00123, high=0.00043)
    check_texts(figures.plot_comparison(pd.concat([far.assign(measure="js", pairs=p) for p in ("all", "adjacent")])))


# Figures returned


def test_figures_are_returned_and_kept_nowhere_else():
    drawn = ma.draw_figures(EXAMPLES, style="icml", which=["figure3", "rank_needed_lora-8"])
    assert list(drawn) == ["figure3: MSPLoRA 8/8/8", "rank_needed: LoRA r=8"]
    assert drawn["rank_needed"] is drawn["rank_needed: LoRA r=8"]
    with pytest.raises(KeyError, match="'figure4': choose from figure3: MSPLoRA 8/8/8, rank_needed: LoRA r=8"):
        drawn["figure4"]
    assert all(isinstance(figure, Figure) for figure in drawn.values())
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        assert not pyplot.get_fignums()


@pytest.mark.slow
def test_what_is_returned_is_what_is_written(tmp_path):
    table, _ = tables(12)
    pairs = pairs_of(12).assign(run="cola/lora-8/seed0")
    names = [path.stem for path in figures.write_figures(table, tmp_path, [], pairs=pairs)]
    drawn = ma.draw_figures(table, which=["figure4", "overlap_between_layers"], pairs=pairs)
    with pytest.raises(ma.AnalysisError, match=r"no figure 'figure5' .* choose from figure3: MSPLoRA 8/4/2, figure4: "):
        ma.draw_figures(table, which="figure5")
    assert {"figure4_msplora-8-4-2_minus_lora-8", "overlap_between_layers_lora-8"} < set(names)
    assert set(drawn) == {"figure4: MSPLoRA 8/4/2 − LoRA r=8", "overlap_between_layers: LoRA r=8"}
    (mesh,) = meshes(drawn["figure4"])
    (expected,) = meshes(figures.plot_figure4(table))
    np.testing.assert_array_equal(mesh.get_array(), expected.get_array())


def test_a_returned_figure_can_be_restyled_and_saved(tmp_path):
    figure = ma.draw_figures(tables(12)[0], which="spectra_by_layer_lora-8")["spectra_by_layer"]
    figure.suptitle("")
    figure.set_figwidth(6)
    figure.axes[0].set_title("my words")
    figure.savefig(tmp_path / "mine.png", dpi=40)
    assert (tmp_path / "mine.png").stat().st_size > 1000


# Names, sizes and values that do harm


@pytest.mark.parametrize("style", [None, "acl-column"])
def test_names_are_shown_as_they_are(style):
    modules = ["a$b$c", r"\alpha_{1}^", "<b>&amp;", "to_out.0", "very_" * 12 + "long", "x\ny", "ключ"]
    table = spectra_of(layers=3, modules=modules, epochs=(0, 1), tasks=["cola"], seeds=[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.plot_rank_needed(table, style=style, epoch=1)
        check_texts(figure)
        shown = {label.get_text().replace("\n", "") for label in figure.axes[0].get_yticklabels()}
        assert shown == {module.replace("\n", r"\n") for module in modules}
        stack = "$stack$.of_" + "many_" * 20 + "words"
        named = table.assign(name=[name.replace("roberta.encoder.layer", stack) for name in table["name"]])
        both = pd.concat([table, named], ignore_index=True)
        for each in (figures.plot_kl_between_layers, figures.plot_spectra_by_layer):
            check_texts(each(both, stack=stack, style=style, epoch=1))


def test_long_names_of_variants_in_a_legend():
    stacks = [f"model.{'tower_of_blocks_' * 5}{i}" for i in range(2)]
    table = pd.concat([spectra_of(stack=stack, tasks=[task], layers=2, epochs=(0, 1))
                       for stack, task in zip(stacks, ("cola", "rte"), strict=True)])  # fmt: skip
    check_texts(figures.plot_m_eff_over_epochs(table, style="acl-column"))


@pytest.mark.slow
def test_one_layer_one_epoch_nothing_learned():
    for table in (
        spectra_of(layers=1, epochs=(3,), tasks=["cola"], seeds=[0], modules=["q"]),
        spectra_of("msplora", (1, 1, 1), layers=2, epochs=(0, 1), tasks=["cola"], seeds=[0]).assign(sigma=0.0),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drawn = ma.draw_figures(table, "acl-column")
        assert drawn
        for figure in drawn.values():
            check_texts(figure)


# Bytes


CODE = """
import sys
from pathlib import Path

import matplotlib as mpl
sys.path.insert(0, sys.argv[1])
from test_figures_style import write_styled

mpl.rcParams.update({"font.size": 20, "savefig.bbox": "tight", "image.cmap": "jet", "pdf.fonttype": 3})
write_styled(Path(sys.argv[2]))
"""


def write_styled(folder):
    folder.mkdir()
    table, _ = tables(12)
    matrices = prepare(table)
    Plot("figure3", numbers_of_figure3(matrices, "MSPLoRA 8/4/2"), draw_figure3).write(
        folder, figures.FORMATS, "icml-column"
    )
    for plot in all_plots({"comparison": comparison_table()}):
        plot.write(folder, figures.FORMATS, "neurips")


def test_bytes_are_those_of_any_other_process(tmp_path):
    write_styled(tmp_path / "here")
    subprocess.run(
        [sys.executable, "-c", CODE, str(Path(__file__).parent), str(tmp_path / "there")],
        check=True, env={"PYTHONHASHSEED": "7", "PATH": "", "HOME": str(tmp_path), "TZ": "Asia/Tokyo"},
    )  # fmt: skip
    here, there = (
        {path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.*")}
        for root in (tmp_path / "here", tmp_path / "there")
    )
    assert len(here) == 2 * 4
    assert here == there, json.dumps([str(path) for path in here if here[path] != there.get(path)])
