"""Null models of what layers share: against dense matrices, and on runs whose sharing was planted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis.ask.nulls import COLUMNS
from msplora_analysis.cli import app
from msplora_analysis.compute.measures.joint_basis import joint_parameters, kept_energy, separate_parameters
from msplora_analysis.compute.measures.reliability import normalised_overlap
from msplora_analysis.compute.measures.shared_energy import shared_energy
from msplora_analysis.compute.nulls import joint, pairs, stacked
from msplora_analysis.errors import AnalysisError

ROWS, COLS, RANK, LAYERS = 30, 40, 3, 4


def factors(rng: np.random.Generator, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(rng.normal(size=(RANK, COLS)), rng.normal(size=(ROWS, RANK))) for _ in range(n)]


def projection(matrix: np.ndarray) -> np.ndarray:
    """On the space of its first directions on the right, dense."""
    vt = np.linalg.svd(matrix)[2][:RANK]
    return vt.T @ vt


def test_pairs_are_those_of_dense_matrices() -> None:
    updates = factors(np.random.default_rng(0), 3)
    dense = [b @ a for a, b in updates]
    i, j = np.triu_indices(3, 1)
    found = pairs(stacked(updates), i, j)
    for at, (x, y) in enumerate(zip(i, j, strict=True)):
        p, q = projection(dense[x]), projection(dense[y])
        assert found["overlap_in"][at] == pytest.approx(np.trace(p @ q) / RANK)
        both = [np.sum((one @ space) ** 2) / np.sum(one**2) for one, space in ((dense[y], p), (dense[x], q))]
        assert found["shared_in"][at] == pytest.approx(np.mean(both))
        p, q = projection(dense[x].T), projection(dense[y].T)
        assert found["overlap_out"][at] == pytest.approx(np.trace(p @ q) / RANK)
    assert found["expected_in"][0] == RANK / COLS
    assert found["shared_expected_out"][0] == RANK / ROWS
    assert np.isnan(shared_energy(np.ones((2, 2)), np.zeros(2)))


def test_chance_is_what_random_directions_give() -> None:
    updates = stacked(factors(np.random.default_rng(1), 60))
    found = pairs(updates, *np.triu_indices(60, 1))
    assert found["overlap_in"].mean() == pytest.approx(RANK / COLS, rel=0.05)
    assert found["shared_out"].mean() == pytest.approx(RANK / ROWS, rel=0.05)


def test_layers_of_one_basis_need_fewer_parameters_than_rotated_ones() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(RANK, COLS)), rng.normal(size=(ROWS, RANK))
    together = stacked([(rng.normal(size=(RANK, RANK)) @ a, b) for _ in range(LAYERS)])
    found = joint(together)
    exact = joint_parameters(together.left, together.sigma, together.right, 1.0)
    assert exact == RANK * (ROWS + COLS) + LAYERS * RANK**2
    assert (found["joint"] < 0.5 * found["rotated"]).all()
    apart = joint(stacked(factors(rng, LAYERS)))
    assert apart["joint"] == pytest.approx(apart["rotated"], rel=0.15)
    assert separate_parameters(np.array([[3.0, 1.0], [2.0, 0.0]]), 5, 7, 0.9) == 2 * 12  # 9 + 4 of 14


def test_kept_energy_is_that_of_dense_projections() -> None:
    of = stacked(factors(np.random.default_rng(0), 2))
    dense = [(u.T * s) @ v for u, s, v in zip(of.left, of.sigma, of.right, strict=True)]
    v = np.linalg.eigh(sum(w.T @ w for w in dense))[1][:, ::-1][:, :2]
    u = np.linalg.eigh(sum(w @ w.T for w in dense))[1][:, ::-1][:, :4]
    expected = sum(np.sum((u.T @ w @ v) ** 2) for w in dense) / sum(np.sum(w**2) for w in dense)
    assert kept_energy(of.left, of.sigma, of.right)[3, 1] == pytest.approx(expected)


def test_normalised_overlap_by_hand() -> None:
    assert normalised_overlap(0.042, 0.034, 0.050, 0.021) == pytest.approx(8 / 29)
    assert np.isnan(normalised_overlap(0.1, 0.1, 0.02, 0.02))


def write(folder: Path, a: np.ndarray, b: np.ndarray) -> None:
    """A LoRA adapter of (layers, rank, cols) and (layers, rows, rank)."""
    folder.mkdir(parents=True)
    key = "base_model.model.encoder.layer.{}.query.lora_{}.weight"
    tensors = {
        key.format(i, name): np.ascontiguousarray(x[i]) for name, x in (("A", a), ("B", b)) for i in range(LAYERS)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of two tasks: A begins at random, and training adds two input directions to it.

    One of them all layers have in common whatever the seed, the other within a run.
    """
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for task in ("cola", "mrpc"):
        everywhere = rng.normal(size=COLS)
        for seed in (1, 2, 3):
            mine = rng.normal(size=COLS)
            start = rng.normal(size=(LAYERS, RANK, COLS)) / 2
            learned = np.zeros_like(start)
            learned[:, 0], learned[:, 1] = everywhere, mine
            b = rng.normal(size=(LAYERS, ROWS, RANK))
            run = folder / task / "lora" / f"seed-{seed}"
            write(run / "checkpoint-0", start, np.zeros_like(b))
            write(run / "checkpoint-9", start + learned, b)
    return folder


def test_what_is_learned_together_is_told_from_what_inputs_give(runs: Path) -> None:
    summary, pairs_, joint_ = ma.load_nulls(runs)
    assert summary.dtypes.astype(str).replace("object", "str").to_dict() == COLUMNS
    learned = summary[(summary["part"] == "learned") & (summary["measure"] == "overlap_in")].iloc[0]
    assert (learned["method"], learned["runs"], learned["tasks"]) == ("LoRA r=3", 6, 2)
    # Of two learned directions, neighbours of one run share both; of two runs one and what chance gives of the other.
    assert learned["adjacent"] == pytest.approx(1, abs=1e-6)
    assert [learned["across"], learned["same_layer"]] == pytest.approx([0.5, 0.5], abs=0.05)
    assert learned["normalised"] == pytest.approx(1.05, abs=0.1)
    assert learned["low"] <= learned["normalised"] <= learned["high"]
    update = summary[(summary["part"] == "update") & (summary["measure"] == "overlap_in")].iloc[0]
    assert update["adjacent"] < 0.9
    outputs = summary[summary["measure"] == "overlap_out"]
    assert outputs["adjacent"].to_numpy() == pytest.approx(RANK / ROWS, abs=0.06)
    ratio = joint_["joint"].astype(float) / joint_["rotated"]
    assert (ratio[joint_["part"] == "learned"] < 0.95).all()
    # A seed of another task is no null model.
    assert (pairs_["run_i"].str.split("/").str[0] == pairs_["run_j"].str.split("/").str[0]).all()


def test_few_runs_have_no_interval_and_one_has_no_null_model(runs: Path) -> None:
    two = ma.load_nulls([runs / "cola" / "lora" / f"seed-{seed}" for seed in (1, 2)]).summary
    assert two[["low", "high"]].isna().all(axis=None)
    assert two.loc[two["measure"].str.endswith("in"), "normalised"].notna().all()
    one = ma.load_nulls(runs / "cola" / "lora" / "seed-1").summary
    assert one["adjacent"].notna().all()
    assert one[["across", "same_layer", "normalised"]].isna().all(axis=None)


def test_command(runs: Path, tmp_path: Path) -> None:
    arguments = ["redundancy", str(runs), "--out", str(tmp_path), "--format", "csv"]
    result = CliRunner().invoke(app, [*arguments, "--nulls", "--figure", "png"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "LoRA r=3: 6 runs, tasks: 2" in result.stdout
    written = {path.name for path in tmp_path.iterdir()}
    assert {"nulls.csv", "nulls_pairs.csv", "joint.csv", "nulls_lora-3.png", "joint_basis.png"} <= written
    assert list(pd.read_csv(tmp_path / "nulls.csv")) == list(COLUMNS)
    for more, message in ((["--figure", "png"], "add --nulls"), (["--nulls", "--style", "icml"], "add --figure")):
        result = CliRunner().invoke(app, [*arguments, *more])
        assert isinstance(result.exception, AnalysisError)
        assert message in str(result.exception)


def test_compare_weighs_overlaps_by_one_layer_of_two_runs(runs: Path) -> None:
    seeds = [runs / "cola" / "lora" / f"seed-{seed}" for seed in (1, 2, 3)]
    table = ma.compare(seeds[:2], seeds[2])
    rows = ma.load_nulls(seeds[:2]).pairs.query("part == 'update' and group_i == group_j")
    found = table[(table["measure"] == "overlap_in") & (table["question"] == "difference")]["same_layer"]
    assert found.tolist() == pytest.approx([(rows["overlap_in"] - rows["expected_in"]).mean()] * 2)
    with pytest.raises(AnalysisError, match="stands on both sides"):
        ma.compare(seeds, seeds)
