"""Adapters that are read with --base: PEFT merges each in float64, and the difference of the weights is the truth."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import assert_promised
from safetensors.torch import load_file, save_file
from test_formats_peft import filled, peft, save
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis import AnalysisError, cli
from msplora_analysis.adapters.discovery import discover
from msplora_analysis.files.opening import open_checkpoint
from msplora_analysis.tables import against_base

torch.set_num_threads(1)


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(12, 18)
        self.odd = torch.nn.Linear(14, 18)
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.embedding = torch.nn.Embedding(11, 7)


class Gpt(torch.nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_attn = Conv1D(9, 4)


def merged(tmp_path: Path, config, kind=Layers, turned: bool = False) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """The folder of an adapter, that of its base, and the change of each weight that PEFT merges."""
    torch.manual_seed(0)
    base = kind()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    model = filled(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.2 * torch.rand_like(parameter)
    save(model, tmp_path / "adapter")
    whole = model.double().merge_and_unload()
    changes = {}
    for name, weight in base.named_parameters():
        change = (whole.get_parameter(name) - weight.double()).detach().numpy()
        if change.any() and name.endswith("weight"):
            change = change.reshape(len(change), -1)
            changes[name.removesuffix(".weight")] = change.T if turned or "embedding" in name else change
    assert changes
    return tmp_path / "adapter", tmp_path / "base", changes


def assert_changes(adapter: Path, base: Path, changes: dict[str, np.ndarray]) -> None:
    spectra, metrics = ma.load_tables(adapter, base=base, cache=False)
    assert set(spectra["name"]) == set(changes)
    for name, change in changes.items():
        row = metrics[metrics["name"] == name].iloc[0]
        assert (row["rows"], row["cols"]) == change.shape
        sigma = spectra[spectra["name"] == name]["sigma"].to_numpy()
        exact = np.linalg.svd(change, compute_uv=False)
        assert_promised(sigma, exact[: len(sigma)])
        assert (exact[len(sigma) :] <= 1e-12 * exact[0]).all()


# DoRA


@pytest.mark.parametrize("module", ["linear", "conv", "embedding"])
@pytest.mark.filterwarnings("ignore")
def test_the_true_change_of_dora(tmp_path, module):
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[module], use_dora=True)
    assert_changes(*merged(tmp_path, config))


@pytest.mark.filterwarnings("ignore")
def test_the_true_change_of_dora_where_weights_are_stored_transposed(tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)
    assert_changes(*merged(tmp_path, config, Gpt, turned=True))


def test_what_is_said_of_dora_with_and_without_its_base(tmp_path):
    adapter, base, _ = merged(tmp_path, peft.LoraConfig(r=2, target_modules=["linear"], use_dora=True))
    with pytest.warns(UserWarning, match="low-rank part"):
        ma.load_spectra(adapter, cache=False)
    with pytest.warns(UserWarning, match="whole change of a weight") as said:
        ma.load_spectra(adapter, base=base, cache=False)
    assert not any("low-rank part" in str(one.message) for one in said)


def test_what_dora_adds_to_the_spectrum_of_its_base(tmp_path):
    adapter, base, changes = merged(tmp_path, peft.LoraConfig(r=2, target_modules=["linear"], use_dora=True))
    row = against_base.measure(discover(adapter), base).iloc[0]
    with open_checkpoint(base) as file:
        weight = file.read("linear.weight").astype(float)
    assert row["ratio"] == pytest.approx(np.linalg.norm(changes["linear"], 2) / np.linalg.norm(weight, 2))


@pytest.mark.filterwarnings("ignore")
def test_dora_with_the_base_of_another_model(tmp_path):
    adapter, base, _ = merged(tmp_path, peft.LoraConfig(r=2, target_modules=["linear"], use_dora=True))
    save_file({"linear.weight": torch.ones(18, 13)}, base / "model.safetensors")
    with pytest.raises(AnalysisError, match=r"linear.weight of the base has shape \[18, 13\].*another model"):
        ma.load_spectra(adapter, base=base, cache=False)
    save_file({"other.weight": torch.ones(18, 13)}, base / "model.safetensors")
    with pytest.raises(AnalysisError, match=r"linear.weight.* is in the base"):
        ma.load_spectra(adapter, base=base, cache=False)


# MiSS


@pytest.mark.parametrize("options", [{}, {"init_weights": "bat"}, {"init_weights": "mini", "mini_r": 6}])
def test_miss(tmp_path, options):
    config = peft.MissConfig(r=6, target_modules=["linear"], **options)
    adapter, base, changes = merged(tmp_path, config)
    assert_changes(adapter, base, changes)
    if options.get("init_weights") != "mini":  # before, PEFT called it Bone
        settings = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "BONE"}))
        tensors = load_file(adapter / "adapter_model.safetensors")
        renamed = {key.replace("miss_block", "bone_block"): value for key, value in tensors.items()}
        save_file(renamed, adapter / "adapter_model.safetensors")
        assert_changes(adapter, base, changes)


def test_miss_whose_block_does_not_divide_the_inputs(tmp_path):
    assert_changes(*merged(tmp_path, peft.MissConfig(r=4, target_modules=["odd"])))


def test_miss_without_its_base_or_with_another(tmp_path):
    adapter, base, _ = merged(tmp_path, peft.MissConfig(r=6, target_modules=["linear"]))
    result = CliRunner().invoke(cli.make_app(), ["spectra", str(adapter), "--out", str(tmp_path / "out")])
    assert "give the model that it was trained on as base=" in str(result.exception)
    save_file({"linear.weight": torch.ones(20, 12)}, base / "model.safetensors")
    with pytest.raises(AnalysisError, match=r"linear.miss_block has shape \[6, 18\], the base's weight \[20, 12\]"):
        ma.load_spectra(adapter, base=base, cache=False)


# C3A, HiRA, (IA)³


@pytest.mark.parametrize(
    "config",
    [
        peft.C3AConfig(block_size=6, target_modules=["linear"]),
        peft.HiraConfig(r=3, target_modules=["linear"]),
        peft.IA3Config(target_modules=["linear"], feedforward_modules=[]),
        peft.IA3Config(target_modules=["linear"], feedforward_modules=["linear"]),
    ],
)
def test_updates_of_the_base_and_of_full_rank(tmp_path, config):
    assert_changes(*merged(tmp_path, config))
    if config.peft_type.value != "C3A":
        with pytest.raises(AnalysisError, match="give the model that it was trained on"):
            ma.load_spectra(tmp_path / "adapter", cache=False)
    with pytest.raises(AnalysisError):
        ma.export(tmp_path / "adapter", tmp_path / "plain")
