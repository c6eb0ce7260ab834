"""Results of runs as a paper's table, against means and deviations computed by hand."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from msplora_analysis import AnalysisError
from msplora_analysis.ask.results.summary import load_results
from msplora_analysis.cli import app
from msplora_analysis.show.typeset import grids, latex, markdown


def write_run(folder: Path, metrics: list[float], **settings: Any) -> Path:
    """A run.json as msplora-train writes it, with a metric for epoch 0 and every epoch."""
    record: dict[str, Any] = {
        "settings": {"model": "m", "task": "cola", "method": "lora", "seed": 0, "rank": 8, "ranks": None, "epochs": 2}
        | settings,
        "model": {"name": "roberta_base"},
        "parameters": {"adapter": 294912, "head": 592130, "base": 124_000_000},
        "results": [{"epoch": epoch, "step": 10 * epoch, "metric": metric} for epoch, metric in enumerate(metrics)],
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """LoRA on two tasks with two seeds, MSPLoRA on one task with one."""
    folder = tmp_path / "runs"
    write_run(folder / "lora/cola/0", [0.9, 0.50, 0.40])
    write_run(folder / "lora/cola/1", [0.0, 0.30, 0.60], seed=1)
    write_run(folder / "lora/mrpc/0", [0.0, 0.80, 0.82], task="mrpc")
    write_run(folder / "lora/mrpc/1", [0.0, 0.84, 0.80], task="mrpc", seed=1)
    write_run(folder / "msplora/cola/0", [0.0, 0.58, 0.57], method="msplora")
    return folder


@pytest.mark.parametrize(("at", "values"), [("best", (0.50, 0.60)), ("last", (0.40, 0.60))])
def test_mean_and_deviation_over_seeds(runs: Path, at: str, values: tuple[float, float]) -> None:
    table = load_results(str(runs), at).set_index(["method", "task"])
    cell = table.loc[("LoRA r=8", "cola")]
    assert cell["mean"] == pytest.approx(statistics.mean(values))  # the score before training does not count
    assert cell["deviation"] == pytest.approx(statistics.stdev(values))
    assert (cell["runs"], cell["seeds"], cell["metric"]) == (2, "0,1", "matthews_correlation")
    assert cell["epochs"] == ("1,2" if at == "best" else "2,2")
    assert table.loc[("LoRA r=8", "mrpc"), "metric"] == "accuracy"
    assert table.loc[("MSPLoRA 8/4/2", "cola"), "parameters"] == 294912


def test_an_average_needs_every_task(runs: Path) -> None:
    table = load_results(str(runs))
    averages = table[table["task"] == "average"]
    assert list(averages["method"]) == ["LoRA r=8"]
    assert averages["mean"].iloc[0] == pytest.approx(((0.5 + 0.6) / 2 + (0.82 + 0.84) / 2) / 2)
    assert math.isnan(averages["deviation"].iloc[0])


def test_typeset(runs: Path) -> None:
    table = load_results(str(runs))
    (grid,) = grids(table)
    assert grid.headers == ["CoLA (Mcc)", "MRPC (Acc)", "Avg."]
    text = markdown(table, "a caption")
    assert "| LoRA r=8 | 0.295M | 55.0 ± 7.1 | 83.0 ± 1.4 | 69.0 |" in text
    assert "| MSPLoRA 8/4/2 | 0.295M | **58.0** | – | – |" in text
    tex = latex(table, "a caption")
    assert r"LoRA r=8 & 0.295M & 55.0 $\pm$ 7.1 & 83.0 $\pm$ 1.4 & 69.0 \\" in tex
    assert r"\caption{roberta\_base: a caption}" in tex
    assert tex.count("\\begin{tabular}") == tex.count("\\end{tabular}") == 1


def test_a_lower_perplexity_is_better(tmp_path: Path) -> None:
    for method, values in (("lora", [9.0, 4.0, 5.0]), ("msplora", [9.0, 6.0, 4.5])):
        run = write_run(tmp_path / method, values, task="alpaca", method=method)
        record = json.loads((run / "run.json").read_text())
        record["metric"] = {"name": "perplexity", "greater_is_better": False}
        (run / "run.json").write_text(json.dumps(record))
    table = load_results(str(tmp_path))
    assert list(table["mean"]) == [4.0, 4.5]
    assert "**4.0**" in markdown(table, "")  # as it is, not times 100
    assert "**4.5**" not in markdown(table, "")


def test_an_unfinished_run_is_named(runs: Path) -> None:
    record = json.loads((runs / "lora/cola/0/run.json").read_text())
    del record["results"]
    (runs / "lora/cola/0/run.json").write_text(json.dumps(record))
    table = load_results(str(runs))
    assert table.attrs["unfinished"] == [str(runs / "lora/cola/0")]
    assert table.set_index(["method", "task"]).loc[("LoRA r=8", "cola"), "runs"] == 1


def test_the_same_run_given_twice_counts_once(runs: Path) -> None:
    assert load_results([str(runs), str(runs / "lora")]).equals(load_results(str(runs)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "both LoRA r=8 on cola with seed 0"), ({"seed": 2, "epochs": 9}, "differ in epochs 2 and 9")],
)
def test_runs_that_are_no_repetitions(runs: Path, settings: dict[str, Any], message: str) -> None:
    write_run(runs / "lora/cola/again", [0.0, 0.1, 0.2], **settings)
    with pytest.raises(AnalysisError, match=message):
        load_results(str(runs))


@pytest.mark.parametrize("content", ["{}", '{"settings": [], "results": [1]}', "[1]", "{"])
def test_a_record_of_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(AnalysisError, match=r"run\.json"):
        load_results(str(tmp_path))


def test_the_command(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "tables"
    result = CliRunner().invoke(app, ["results", str(runs), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "55.0 ± 7.1" in result.stdout
    assert {path.name for path in out.iterdir()} == {"results.csv", "results.md", "results.tex"}
    assert (
        (out / "results.md").read_text().startswith("**roberta_base**: mean and standard deviation over seeds (1 to 2")
    )
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["results", str(tmp_path / "empty")])
    assert isinstance(result.exception, AnalysisError)
    assert "run folders of msplora-train" in str(result.exception)
