"""Tables of ablations: read as they were written, found beside adapters, and drawn."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_cases import ablation_of
from matplotlib.figure import Figure as MplFigure
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis import cli
from msplora_analysis.show.figures import draw_figures, write_figures

RUNS = Path(__file__).parents[2] / "examples" / "runs"
ABOUT = ["run", "step", "task", "metric_name"]


def write(folder, table, suffix="parquet", about=True):
    folder.mkdir(parents=True, exist_ok=True)
    raw = table.drop(columns=ABOUT)
    path = folder / f"ablation.{suffix}"
    raw.to_parquet(path) if suffix == "parquet" else raw.to_csv(path, index=False)
    if about:
        told = {"run": "cola", "step": 268, "task": "cola", "metric": "matthews_correlation"}
        (folder / "ablation.json").write_text(json.dumps(told))
    return path


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_table_is_read_as_it_was_written(tmp_path, suffix):
    table = ablation_of(3)
    path = write(tmp_path / "runs" / "checkpoint-268", table, suffix)
    for given in (path, path.parent, tmp_path):
        pd.testing.assert_frame_equal(ma.load_ablation(given), table, check_dtype=False, check_column_type=False)
    assert ma.load_ablation(path)["rank"].dtype == "Int64"


def test_a_table_alone_has_the_name_of_its_folder(tmp_path):
    write(tmp_path / "mine", ablation_of(3), about=False)
    found = ma.load_ablation(tmp_path)
    assert set(found["run"]) == {"mine"}
    assert found[["step", "task", "metric_name"]].isna().all(axis=None)
    assert ma.plot_what_carries(found).axes


def test_two_ablations_of_one_adapter_are_told_apart_by_their_folders(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, ablation_of(3))
    assert ma.load_ablation(tmp_path)["run"].nunique() == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table.drop(columns="kl"), "no column kl"),
        (lambda table: table[table["cut"] != "none"], "whole adapter"),
        (lambda table: table.assign(kl="much"), "type"),
        (lambda table: table.iloc[:0], "whole adapter"),
    ],
)
def test_another_table_is_refused_by_its_name(tmp_path, change, told):
    write(tmp_path, change(ablation_of(3)))
    with pytest.raises(ma.AnalysisError, match=rf"ablation\.parquet.*{told}"):
        ma.load_ablation(tmp_path)


def test_a_folder_without_one_and_a_broken_description_are_refused(tmp_path):
    with pytest.raises(ma.AnalysisError, match="msplora-measure ablate"):
        ma.load_ablation(tmp_path)
    write(tmp_path, ablation_of(3))
    for broken in ('{"run": 3}', '{"run": "a", "step": 36893488147419103232}'):
        (tmp_path / "ablation.json").write_text(broken)
        with pytest.raises(ma.AnalysisError, match=r"ablation\.json"):
            ma.load_ablation(tmp_path)


def test_the_map_and_the_points_show_the_table():
    table = ablation_of(4)
    figure = ma.plot_what_carries(table)
    kl = table[table["cut"] == "module"]["kl"].to_numpy().reshape(4, 2).T  # modules down, layers across
    (cells,) = figure.axes[0].collections
    np.testing.assert_allclose(cells.get_array().reshape(2, 4), kl)
    points = np.sort(np.concatenate([line.get_ydata() for line in figure.axes[1].lines[1:]]))
    np.testing.assert_allclose(points, np.sort(table[table["cut"] == "layer"]["metric_change"]))


def test_ranks_are_drawn_where_the_caller_says():
    table = ablation_of(3)
    ax = MplFigure().subplots()
    assert ma.plot_metric_against_rank(table, ax=ax, quantity="kl") is ax
    for line, cut in zip(ax.lines, ("rank", "rank_task"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), table[table["cut"] == cut]["kl"])
    with pytest.raises(ma.AnalysisError, match="quantity='loss'"):
        ma.plot_metric_against_rank(table, ax=ax, quantity="loss")


def test_only_cuts_with_a_prediction_are_compared_with_it():
    table = ablation_of(3)
    ax = MplFigure().subplots()
    ma.plot_predicted_against_measured(table, ax=ax)
    drawn = np.concatenate([line.get_xdata() for line in ax.lines[1:]])
    np.testing.assert_allclose(np.sort(drawn), np.sort(table["predicted_kl"][1:]))
    with pytest.raises(ma.AnalysisError, match="moments"):
        ma.plot_predicted_against_measured(table.assign(predicted_kl=np.nan))


def test_of_several_adapters_one_is_chosen(tmp_path):
    table = pd.concat([ablation_of(3), ablation_of(3, step=536), ablation_of(3, run="rte")], ignore_index=True)
    with pytest.raises(ma.AnalysisError, match="cola, rte"):
        ma.plot_what_carries(table)
    with pytest.raises(ma.AnalysisError, match="268, 536"):
        ma.plot_what_carries(table, run="cola")
    assert ma.plot_what_carries(table, run="cola", step=536).axes
    stems = [path.stem for path in write_figures(None, tmp_path, (), ablation=table) if "carries" in path.stem]
    assert stems == ["what_carries_cola-268", "what_carries_cola-536", "what_carries_rte"]


@pytest.mark.slow
def test_figures_draws_ablations_beside_adapters_and_alone(tmp_path):
    write(tmp_path / "alone", ablation_of(3))
    names = {"what_carries", "metric_against_rank", "predicted_against_measured"}
    assert set(draw_figures(tmp_path / "alone")) == names
    out = tmp_path / "out"
    paths = [str(RUNS / "lora-8" / "checkpoint-270"), str(tmp_path / "alone")]
    result = CliRunner().invoke(cli.make_app(), ["figures", *paths, "--out", str(out), "--format", "svg"])
    assert result.exit_code == 0, result.output
    stems = {path.stem for path in out.glob("*.svg")}
    assert names < stems
    assert "spectra_by_layer_lora-8" in stems
