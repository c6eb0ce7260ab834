"""Findings: faults made on purpose are named at their place, and healthy runs are left in peace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from adapters import lora_config, lora_tensors, write_adapter
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis.adapters.discovery import discover
from msplora_analysis.ask.findings import KINDS
from msplora_analysis.cli import app
from msplora_analysis.compute.measures.rank_needed import energy_rank
from msplora_analysis.errors import AnalysisError
from msplora_analysis.tables.against_base import measure

FIRST_LOOK = Path(__file__).parents[1] / "data" / "first_look"
STUDY = sorted((Path(__file__).parents[2] / "figures" / "study").glob("**/spectra.parquet"))

Tensors = dict[str, np.ndarray]
Edit = Callable[[Tensors], None]


def broken_run(tmp_path: Path, edit: Edit, run: str = "lora-4", only: str = "*") -> Path:
    """A healthy run with every checkpoint, or those that ``only`` matches, edited."""
    folder = tmp_path / "run"
    shutil.copytree(FIRST_LOOK / run, folder)
    for file in folder.glob(f"checkpoint-{only}/adapter_model.safetensors"):
        tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
        edit(tensors)
        save_file(tensors, file)
    return folder


def key(layer: int, module: str, factor: str) -> str:
    return f"base_model.model.bert.encoder.layer.{layer}.attention.self.{module}.lora_{factor}.weight"


def places(findings: pd.DataFrame, kind: str) -> set[tuple[int, str]]:
    rows = findings[findings["id"] == kind]
    return set(zip(rows["group"], rows["module"], strict=True))


def serious(findings: pd.DataFrame) -> set[str]:
    return set(findings.loc[findings["severity"] != "info", "id"])


def table(sigma: np.ndarray, **columns: Any) -> pd.DataFrame:
    """Spectra (checkpoints, layers, r) of one module, at epochs 1, 2, ..."""
    rows = [
        {"run": "r", "step": 10 * (t + 1), "epoch": t + 1, "scale": "layer", "group": i, "module": "query"}
        | {"name": f"layer.{i}.query", "k": k + 1, "sigma": value}
        | columns
        for t, layers in enumerate(sigma)
        for i, spectrum in enumerate(layers)
        for k, value in enumerate(spectrum)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("run", ["lora-4", "msplora-4-4-4"])
def test_healthy_runs_have_no_errors_or_warnings(run: str) -> None:
    findings = ma.diagnose(FIRST_LOOK / run, cache=False)
    assert serious(findings) == set()
    assert set(findings["id"]) <= {"dominant-direction", "rank-saturated", "rank-unused"}


@pytest.mark.slow
@pytest.mark.parametrize("file", STUDY, ids=lambda file: file.parent.name)
def test_the_study_has_no_errors_or_warnings(file: Path) -> None:
    findings = ma.diagnose(ma.read_spectra(file))
    assert set(findings["id"]) <= {"dominant-direction", "rank-saturated", "rank-unused"}
    assert set(findings["severity"]) == {"info"}


def test_a_frozen_b_is_named(tmp_path: Path) -> None:
    run = broken_run(tmp_path, lambda tensors: tensors[key(2, "query", "B")].fill(0))
    findings = ma.diagnose(run, cache=False)
    assert places(findings, "no-update") == {(2, "query")}
    assert serious(findings) == {"no-update"}
    row = findings.iloc[0]
    assert (row["severity"], row["run"], row["step"], row["epoch"], row["scale"]) == ("error", "run", 270, 6, "layer")


def test_a_layer_that_never_moved_is_named(tmp_path: Path) -> None:
    fixed = load_file(FIRST_LOOK / "lora-4/checkpoint-135/adapter_model.safetensors")
    names = [key(1, "value", factor) for factor in "AB"]
    run = broken_run(tmp_path, lambda tensors: tensors.update({name: fixed[name] for name in names}))
    findings = ma.diagnose(run, cache=False)
    assert places(findings, "no-update") == {(1, "value")}
    assert serious(findings) == {"no-update"}


def test_the_adapter_before_training_is_no_fault() -> None:
    assert ma.diagnose(FIRST_LOOK / "lora-4/checkpoint-0", cache=False).empty


def test_nan_is_a_finding_and_the_other_checkpoints_are_read(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[key(3, "value", "A")][0, 0] = np.nan

    findings = ma.diagnose(broken_run(tmp_path, edit, only="270"), cache=False)
    row = findings.iloc[0]
    assert (row["id"], row["severity"], row["step"], row["name"]) == ("non-finite", "error", 270, key(3, "value", "A"))
    assert set(findings["step"]) == {225, 270}  # the last readable is diagnosed
    assert serious(findings) == {"non-finite"}


def test_nothing_but_nan(tmp_path: Path) -> None:
    tensors = lora_tensors("layer.0.query")
    next(iter(tensors.values()))[:] = np.inf
    findings = ma.diagnose(write_adapter(tmp_path / "a", tensors), cache=False)
    assert findings["id"].tolist() == ["non-finite"]


def test_other_unreadable_files_are_bad_input(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", lora_tensors("layer.0.query") | {"x.y": np.zeros(3, np.float32)})
    with pytest.raises(AnalysisError, match=r"unknown tensors \(1\): x\.y"):
        ma.diagnose(tmp_path / "a", cache=False)


@pytest.mark.parametrize("only", ["*", "270"])
def test_a_layer_scaled_by_50_is_named(tmp_path: Path, only: str) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[key(3, "query", "B")] *= 50

    findings = ma.diagnose(broken_run(tmp_path, edit, only=only), cache=False)
    assert places(findings, "norm-outlier") == {(3, "query")}
    assert places(findings, "norm-jump") == (set() if only == "*" else {(3, "query")})
    assert serious(findings) <= {"norm-outlier", "norm-jump", "large-update"}
    assert places(findings, "large-update") <= {(3, "query")}


@pytest.mark.parametrize("factor", [1, 10])
def test_norms_that_rise_with_depth_hide_no_layer(factor: float) -> None:
    """The last layers are 30 times as large as the first, and none of them is a fault; the fourth times 10 is."""
    norms = np.exp(3.4 * np.arange(30) / 29 + 0.2 * np.random.default_rng(0).standard_normal(30))
    norms[3] *= factor
    rows = {"run": "r", "step": 9, "epoch": 1.0, "scale": "layer", "module": "q", "k": 1, "sigma": norms}
    layers = pd.DataFrame(rows | {"group": range(30), "name": [f"layers.{i}.q" for i in range(30)]})
    findings = ma.diagnose(layers)
    assert places(findings, "norm-outlier") == ({(3, "q")} if factor > 1 else set())


def test_a_small_layer_is_information(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[key(3, "query", "B")] /= 50

    findings = ma.diagnose(broken_run(tmp_path, edit), cache=False)
    assert places(findings, "norm-outlier") == {(3, "query")}
    assert serious(findings) == set()


def test_the_same_adapter_in_two_layers_is_named(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for factor in "AB":
            tensors[key(4, "value", factor)] = tensors[key(1, "value", factor)]

    findings = ma.diagnose(broken_run(tmp_path, edit), cache=False)
    assert serious(findings) == {"identical-update"}
    rows = findings[findings["id"] == "identical-update"]
    assert [json.loads(details) for details in rows["details"]] == [{"groups": [1, 4]}]
    assert rows["module"].tolist() == ["value"]


def test_neighbours_in_the_same_directions_are_named(tmp_path: Path) -> None:
    """Another update within the same subspaces: redundant, not identical."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0].astype(np.float32)

    def edit(tensors: Tensors) -> None:
        tensors[key(3, "query", "A")] = tensors[key(2, "query", "A")]
        tensors[key(3, "query", "B")] = tensors[key(2, "query", "B")] @ turn

    findings = ma.diagnose(broken_run(tmp_path, edit, only="270"), cache=False)
    rows = findings[findings["id"] == "adjacent-redundant"]
    assert [json.loads(details)["groups"] for details in rows["details"]] == [[2, 3]]
    assert (rows["severity"] == "info").all()


def test_coupled_scales_are_named(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        layer = {name: tensor for name, tensor in tensors.items() if ".layer.0." in name and "query" in name}
        for name in layer:
            if ".msplora_layer." in name:
                tensors[name] = layer[name.replace("msplora_layer", "msplora_mid")]

    findings = ma.diagnose(broken_run(tmp_path, edit, "msplora-4-4-4"), cache=False)
    rows = findings[findings["id"] == "scales-coupled"]
    assert list(zip(rows["scale"], rows["group"], rows["module"], strict=True)) == [("mid-layer", 0, "query")]


def test_a_direction_that_takes_over_is_named() -> None:
    """Rank-1 spikes: sigma_1 of one layer grows on and on, as in ostris/ai-toolkit#964."""
    sigma = np.full((12, 6, 8), 1.0) * np.linspace(0.5, 1, 12)[:, None, None] * np.linspace(1, 0.5, 8)
    assert ma.diagnose(table(sigma)).query("id == 'dominance-growing'").empty
    sigma[:, 2, 0] = 1.5 ** np.arange(12)
    findings = ma.diagnose(table(sigma))
    assert places(findings, "dominance-growing") == {(2, "query")}
    assert places(findings, "dominant-direction") == {(2, "query")}
    # Concentrated from the start is not growing.
    sigma[:, 2, 0] = 40
    findings = ma.diagnose(table(sigma))
    assert places(findings, "dominance-growing") == set()


def test_spectra_that_stop_changing() -> None:
    growth = np.minimum(np.arange(1, 13), 6) / 6
    sigma = growth[:, None, None] * np.linspace(1, 0.3, 8) * np.ones((12, 3, 1))
    rows = ma.diagnose(table(sigma)).query("id == 'spectra-converged'")
    assert rows["epoch"].tolist() == [6]
    sigma = (np.arange(1, 13) / 12)[:, None, None] * np.linspace(1, 0.3, 8) * np.ones((12, 3, 1))
    assert ma.diagnose(table(sigma)).query("id == 'spectra-converged'").empty


def test_rank_unused_saturated_and_oversized() -> None:
    steep, flat, middle = [1, 0.5, 0.01, 0, 0, 0, 0, 0], np.ones(8), np.linspace(1, 0.2, 8)
    findings = ma.diagnose(table(np.array([[steep, flat, middle]])))
    assert places(findings, "rank-unused") == {(0, "query")}
    assert places(findings, "rank-saturated") == {(1, "query")}
    findings = ma.diagnose(table(np.array([[[1] + 15 * [1e-3]] * 3])))
    assert findings["id"].tolist()[0] == "rank-oversized"


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_energy_rank_against_a_loop(share: float) -> None:
    rng = np.random.default_rng(0)
    sigma = -np.sort(-(rng.random((20, 6)) ** 4), axis=1)
    sigma[3] = 0
    for spectrum, rank in zip(sigma, energy_rank(sigma, share), strict=True):
        total = (spectrum**2).sum()
        expected = next((k for k in range(1, 7) if (spectrum[:k] ** 2).sum() >= share * total * (1 - 1e-12)), None)
        assert np.isnan(rank) if total == 0 else rank == expected


def test_updates_against_the_base(tmp_path: Path) -> None:
    """Ratio and intruders of planted updates: a new direction, an old one, and one far too large."""
    rng = np.random.default_rng(0)
    base: Tensors = {}
    tensors: Tensors = {}
    u, _ = np.linalg.qr(rng.standard_normal((24, 24)))
    v, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    weight = u[:, :20] @ np.diag(np.linspace(2, 0.1, 20)) @ v.T
    new = u[:, 20]  # orthogonal to every left singular vector
    for layer, (left, size) in enumerate([(new, 3.0), (u[:, 0], 3.0), (u[:, 1], 30.0), (new, 0.01)]):
        base[f"encoder.layer.{layer}.query.weight"] = weight.astype(np.float32)
        name = f"base_model.model.bert.encoder.layer.{layer}.query"
        right = v[:, [19, 0, 1, 19][layer]]
        tensors[f"{name}.lora_A.weight"] = np.stack([right, 0 * right]).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = np.stack([left, 0 * left], 1).astype(np.float32) * size / 2  # alpha / r = 2
    write_adapter(tmp_path / "run", tensors, lora_config())
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    measured = measure(discover(tmp_path / "run"), tmp_path / "base")
    assert measured["ratio"].tolist() == pytest.approx([1.5, 1.5, 15, 0.005], rel=1e-5)
    assert measured["intruders"].tolist() == [1, 0, 0, 0]
    findings = ma.diagnose(tmp_path / "run", base=tmp_path / "base", cache=False)
    assert places(findings, "large-relative-update") == {(2, "query")}
    assert places(findings, "intruder-dimensions") == {(0, "query")}

    save_file({name: tensor.T.copy() for name, tensor in base.items()}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(AnalysisError, match="has shape"):
        measure(discover(tmp_path / "run"), tmp_path / "base")
    write_adapter(tmp_path / "run", tensors, lora_config(fan_in_fan_out=True))
    assert measure(discover(tmp_path / "run"), tmp_path / "base")["intruders"].tolist() == [1, 0, 0, 0]


def test_every_kind_says_where_its_threshold_is_from() -> None:
    assert all(kind.source and kind.advice and kind.title for kind in KINDS.values())
    assert all(name == kind.id and kind.severity in ("error", "warning", "info") for name, kind in KINDS.items())


def test_command(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[key(3, "query", "B")] *= 50
        tensors[key(2, "query", "B")].fill(0)
        tensors[key(2, "value", "B")].fill(0)

    run = broken_run(tmp_path, edit)
    result = CliRunner().invoke(app, ["diagnose", str(run), "--no-cache"])
    assert result.exit_code == 0, result.output
    first, *_ = result.stdout.splitlines()
    assert first.startswith("error no-update:") or "no-update" in first
    assert "layer 2 query" in result.stdout
    assert "also layer 2 value" in result.stdout
    assert result.stdout.index("no-update") < result.stdout.index("norm-outlier") < result.stdout.index("rank-unused")
    assert "What rank does it use? Weights alone do not tell." in result.stdout
    assert result.stdout.count("$ msplora-measure moments") == 1  # two questions, one command

    result = CliRunner().invoke(app, ["diagnose", str(run), "--no-cache", "--json"])
    found = json.loads(result.stdout)
    ids = [row["id"] for row in found["findings"]]
    assert ids[:2] == ["no-update", "no-update"]
    assert found["findings"][0]["group"] == 2
    assert found["advice"][0]["answers"][0]["question"] == "Did it learn anything?"


@pytest.mark.slow
def test_real_trainings_gone_wrong(tmp_path: Path) -> None:
    """A learning rate 100 times too high, and a rank far too large, on a toy BERT; beside it one as it should be."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)

    def train(name: str, rank: int, rate: float) -> None:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, vocab_size=40
        )
        model = transformers.BertForSequenceClassification(config)
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=16, target_modules=["query", "value"])
        model = peft.get_peft_model(model, lora)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        generator = torch.Generator().manual_seed(0)
        for step in range(1, 101):
            tokens = torch.randint(3, 40, (16, 8), generator=generator)
            loss = model(input_ids=tokens, labels=(tokens[:, 0] > tokens[:, 3]).long()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                folder = tmp_path / name / f"checkpoint-{step}"
                model.save_pretrained(folder)
                (folder / "trainer_state.json").write_text(json.dumps({"epoch": step / 20, "global_step": step}))

    train("healthy", 8, 2e-3)
    train("fast", 8, 0.2)
    train("wide", 64, 5e-3)
    findings = ma.diagnose(tmp_path, cache=False)
    assert serious(findings[findings["run"] == "healthy"]) == set()
    fast = findings[(findings["run"] == "fast") & (findings["id"] == "large-update")]
    assert len(fast) == 8  # every layer and module
    assert "rank-oversized" in set(findings[findings["run"] == "wide"]["id"])
    assert "rank-oversized" not in set(findings[findings["run"] != "wide"]["id"])
