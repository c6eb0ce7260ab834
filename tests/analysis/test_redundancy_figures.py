"""Figures of what layers and scales share: their numbers, what the artists show, what is drawn from where."""

import warnings

import numpy as np
import pandas as pd
import pytest
from adapters import lora_config, lora_tensors, msplora_config, msplora_tensors, write_adapter
from test_cli import run
from test_figures import meshes

import msplora_analysis as ma
from msplora_analysis.show.drawing.plot import Plot
from msplora_analysis.show.figures import plot_decoupling_over_epochs, plot_overlap_between_layers, write_figures

RANKS = {"global": 5, "mid": 3, "layer": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of LoRA and of MSPLoRA, three epochs; at the first all B are zero."""
    root = tmp_path_factory.mktemp("figures") / "runs"
    names = [f"encoder.layer.{layer}.self.{module}" for layer in range(6) for module in ("query", "value")]
    for seed in range(2):
        for epoch in range(3):
            scale = np.float32(epoch > 0)
            lora = lora_tensors(*names, rank=3, rows=20, cols=18, seed=10 * seed + epoch)
            mspl = msplora_tensors(range(6), [0, 2, 4], RANKS, ("query", "value"), seed=10 * seed + epoch)
            for tensors, method, config in ((lora, "lora", lora_config(r=3)), (mspl, "msplora", msplora_config())):
                tensors = {
                    key: values * scale if key.endswith((".B", "lora_B.weight")) else values
                    for key, values in tensors.items()
                }
                write_adapter(root / method / f"seed{seed}" / f"checkpoint-{epoch}", tensors, config, epoch=epoch)
    return root


@pytest.fixture(scope="module")
def tables(runs):
    return ma.load_redundancy(runs, details=True)


def test_overlap_matrices_show_the_means_of_the_last_epoch(tables):
    figure = plot_overlap_between_layers(tables.pairs, method="LoRA r=3")
    of_kl, *rest = meshes(figure)
    grey, shown = rest[0::2], rest[1::2]  # what chance explains, and what is beyond
    kl = np.asarray(of_kl.get_array())
    inside, outside = (np.ma.filled(mesh.get_array().astype(float), np.nan) for mesh in shown)
    table = tables.pairs[tables.pairs["run"].str.startswith("lora") & (tables.pairs["epoch"] == 2)]
    means = table.groupby(["group_i", "group_j"])[["kl_ij", "kl_ji", "overlap_in", "overlap_out"]].mean()
    for (i, j), row in means.iterrows():
        assert kl[i, j] == pytest.approx(row["kl_ij"])
        assert kl[j, i] == pytest.approx(row["kl_ji"])
        sides = ((inside, grey[0], "in", 3 / 18), (outside, grey[1], "out", 3 / 20))
        for values, by_chance, side, chance in sides:
            beyond = row[f"overlap_{side}"] - chance
            # Two modules, two runs: means of four overlaps.
            if abs(beyond) <= 2 * table[f"deviation_{side}"].iloc[0] / np.sqrt(4):
                assert np.isnan(values[i, j])
                assert not np.ma.getmaskarray(by_chance.get_array())[i, j]
            else:
                assert values[i, j] == values[j, i] == pytest.approx(beyond)
    assert np.isnan(inside).sum() > 6
    for values in (kl, inside, outside):
        assert np.isnan(np.ma.filled(values.astype(float), np.nan).diagonal()).all()
    assert of_kl.norm.vmin == 0
    assert shown[0].norm is shown[1].norm
    assert -shown[0].norm.vmin == shown[0].norm.vmax >= max(np.nanmax(inside), np.nanmax(outside))
    title = figure.get_suptitle().replace("\n", " ")
    assert "epoch 2, mean over 2 runs" in title
    assert "red: more than by chance (0.17 in, 0.15 out), blue: less; grey: chance alone" in title


def test_a_method_must_be_chosen_where_there_are_several(tables):
    with pytest.raises(
        ma.AnalysisError, match=r"choose the method to draw \(none was given\): LoRA r=3, MSPLoRA layer r=2"
    ):
        plot_overlap_between_layers(tables.pairs)


def test_labels_name_the_methods(tables):
    labels = {run: run.partition("/")[0].upper() for run in tables.pairs["run"].unique()}
    figure = plot_overlap_between_layers(tables.pairs, method="LORA", labels=labels)
    assert figure.get_suptitle().startswith("LORA")


def test_without_details_nothing_is_grey(tmp_path):
    tensors = lora_tensors("layer.0.q", "layer.1.q")
    for factor in "AB":
        first, second = (f"base_model.model.layer.{layer}.q.lora_{factor}.weight" for layer in range(2))
        tensors[second] = tensors[first]
    figure = plot_overlap_between_layers(ma.load_pairs(write_adapter(tmp_path / "run", tensors)))
    assert "grey" not in figure.get_suptitle()
    assert np.ma.count(meshes(figure)[1].get_array()) == 0
    assert meshes(figure)[2].norm.vmax == pytest.approx(1 - ma.load_pairs(tmp_path / "run")["overlap_expected"].max())


def test_decoupling_lines_are_means_over_runs(tables):
    figure = plot_decoupling_over_epochs(tables.scales)
    names = ["global – mid", "global – layer", "mid – layer"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    scales = tables.scales
    for ax, quantity in zip(figure.axes, ("overlap_in", "overlap_out", "cosine"), strict=True):
        for i, (one, other) in enumerate((("global", "mid"), ("global", "layer"), ("mid", "layer"))):
            part = scales[(scales["scale_i"] == one) & (scales["scale_j"] == other)]
            line, chance = ax.lines[2 * i : 2 * i + 2]
            expected = part.groupby("epoch")[quantity].mean()
            np.testing.assert_allclose(line.get_ydata()[1:], expected[1:].astype(float), rtol=1e-6)
            assert np.isnan(line.get_ydata()[0])  # nothing has been learned yet
            by_chance = part[quantity.replace("overlap", "expected")].mean() if quantity != "cosine" else 0
            assert chance.get_ydata()[0] == pytest.approx(by_chance)


@pytest.mark.slow
def test_the_command_draws_both_from_adapters_and_from_tables(runs, tmp_path, capsys, monkeypatch):
    names = ["overlap_between_layers_lora-3", "overlap_between_layers_msplora-5-3-2", "decoupling_over_epochs"]
    out = tmp_path / "from_adapters"
    status, text, error = run(capsys, monkeypatch, "figures", runs, "--out", out, "--format", "svg")
    assert (status, error) == (0, "")
    for name in names:
        assert str(out / f"{name}.svg") in text
        assert (out / f"{name}.csv").is_file()
    for command in (["spectra"], ["redundancy", "--details"]):
        assert run(capsys, monkeypatch, *command, runs, "--out", tmp_path / "tables", "--format", "csv")[0] == 0
    again = tmp_path / "from_tables"
    write = Plot.write
    monkeypatch.setattr(Plot, "write", lambda plot, folder, formats, style: write(plot, folder, ()))  # numbers alone
    status, text, error = run(capsys, monkeypatch, "figures", tmp_path / "tables", "--out", again, "--format", "svg")
    assert (status, error) == (0, "")
    for name in names:
        one, other = (
            pd.read_csv(folder / f"{name}.csv").drop(columns="stack", errors="ignore") for folder in (out, again)
        )
        pd.testing.assert_frame_equal(one, other)


@pytest.mark.slow
def test_stacks_are_drawn_apart(tmp_path):
    names = [f"{stack}.block.{layer}.q" for stack in ("encoder", "decoder") for layer in range(3)]
    write_adapter(tmp_path / "run", lora_tensors(*names))
    spectra, tables = ma.load_spectra(tmp_path / "run"), ma.load_redundancy(tmp_path / "run", details=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = write_figures(spectra, tmp_path / "out", ["svg"], pairs=tables.pairs, scales=tables.scales)
    stems = {path.stem for path in written if path.stem.startswith("overlap")}
    assert stems == {f"overlap_between_layers_lora-2_{stack}-block" for stack in ("encoder", "decoder")}


def test_a_table_of_something_else_is_an_error():
    with pytest.raises(ma.AnalysisError, match="lacks the column run, step"):
        plot_overlap_between_layers(pd.DataFrame({"k": [1]}))
