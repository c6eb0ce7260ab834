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
        self.narrow = torch.nn.Linear(20, 8)
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
    (tmp_path / "base").mkdir(parents=True)
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


# C3A, FourierFT, HiRA, (IA)³, RandLoRA, VeRA


@pytest.mark.parametrize(
    "config",
    [
        peft.C3AConfig(block_size=6, target_modules=["linear"]),
        peft.FourierFTConfig(n_frequency=40, n_frequency_pattern={"odd": 9}, target_modules=["linear", "odd"]),
        peft.HiraConfig(r=3, target_modules=["linear", "conv", "embedding"]),
        peft.IA3Config(target_modules=["linear"], feedforward_modules=[]),
        peft.IA3Config(target_modules=["linear"], feedforward_modules=["linear"]),
        # Of convolutions the factors have one shape for inputs and outputs.
        peft.IA3Config(target_modules=["conv"], feedforward_modules=[]),
        peft.IA3Config(target_modules=["conv"], feedforward_modules=["conv"]),
        peft.RandLoraConfig(r=3, randlora_alpha=12, target_modules=["linear", "odd", "narrow"]),
        peft.VeraConfig(r=5, target_modules=["linear", "odd", "narrow"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_updates_that_need_the_base(tmp_path, config):
    assert_changes(*merged(tmp_path, config))
    if config.peft_type.value != "C3A":
        with pytest.raises(AnalysisError, match="give the model that it was trained on"):
            ma.load_spectra(tmp_path / "adapter", cache=False)
    with pytest.raises(AnalysisError):
        ma.export(tmp_path / "adapter", tmp_path / "plain")


def test_fourierft_and_vera_with_the_base_of_another_model(tmp_path):
    config = peft.FourierFTConfig(n_frequency=200, target_modules=["linear"])
    adapter, base, _ = merged(tmp_path, config)
    save_file({"linear.weight": torch.ones(4, 12)}, base / "model.safetensors")
    with pytest.raises(AnalysisError, match=r"linear.fourierft_spectrum has 200 values, the base's weight \[4, 12\]"):
        ma.load_spectra(adapter, base=base, cache=False)
    adapter, base, _ = merged(tmp_path / "vera", peft.VeraConfig(r=5, target_modules=["linear"]))
    save_file({"linear.weight": torch.ones(18, 13)}, base / "model.safetensors")
    with pytest.raises(AnalysisError, match=r"linear.weight of the base has shape \[18, 13\], its update 18 rows and"):
        ma.load_spectra(adapter, base=base, cache=False)


# Weights that are products themselves


def other(
    folder: Path, tensors: dict[str, np.ndarray], name: str = "model.safetensors", config: dict | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in tensors.items()}, folder / name)
    if config:
        (folder / "splora_config.json").write_text(json.dumps(config))
    return folder / name


RNG = np.random.default_rng(0)
ROWS, COLS, RANK = 14, 12, 3
WEIGHT = RNG.standard_normal((ROWS, COLS)).astype(np.float32)
NORM, HEAD = np.ones(COLS, np.float32), RNG.standard_normal((5, COLS)).astype(np.float32)
BASE = {"model.l.0.q.weight": WEIGHT, "model.norm.weight": NORM, "lm.weight": HEAD}


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# VITA-Group/WeLore, lib/LowRankLayer.py; guoyang9/PELA, DeiT/low_rank.py: the second layer of the first
@pytest.mark.parametrize(("inner", "outer"), [("V", "U"), ("0", "1")])
@pytest.mark.filterwarnings("ignore:.*only the largest")
def test_factored_weights(tmp_path, inner, outer):
    a, b = values(RANK, COLS), values(ROWS, RANK)
    tensors = {f"model.l.0.q.{inner}.weight": a, f"model.l.0.q.{outer}.weight": b, "lm.weight": HEAD + 1}
    weight = b.astype(float) @ a.astype(float)
    path = other(tmp_path / "tuned", {**tensors, "model.norm.weight": NORM})
    with pytest.warns(UserWarning, match="no update's") as said:
        spectra = ma.load_spectra(path, cache=False)
    assert "1 of the model's weights are no products" in str(said[1].message)
    assert_promised(spectra["sigma"].to_numpy(), np.linalg.svd(weight, compute_uv=False)[:RANK])
    other(tmp_path / "base", BASE)
    changes = {"model.l.0.q": weight - WEIGHT, "lm": (HEAD + 1).astype(float) - HEAD}
    assert_changes(path, tmp_path / "base", changes)
    assert_changes(path.parent, tmp_path / "base", changes)
    with pytest.raises(AnalysisError, match="weights themselves"):
        ma.export(path, tmp_path / "plain")


def test_two_layers_that_the_base_has_too_are_no_factors(tmp_path):
    tensors = {"l.0.weight": values(RANK, COLS), "l.1.weight": values(ROWS, RANK)}
    path, base = (
        other(tmp_path / "a", tensors),
        other(tmp_path / "b", {key: value + 1 for key, value in tensors.items()}),
    )
    changes = {key.removesuffix(".weight"): value - (value + 1).astype(float) for key, value in tensors.items()}
    assert_changes(path, base, changes)


# andyjm3/SLTrain, splora/splora_linear.py and its kernel: B A scaled, and values scattered into the flattened weight
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("trained", [False, True])
def test_low_rank_and_sparse_weights(tmp_path, suffix, trained):
    a, b, added = values(RANK, COLS), values(ROWS, RANK), values(20)
    places = np.sort(RNG.permutation(ROWS * COLS)[:20])
    tensors = {"lora_A": a, "lora_B": b, "sparse_index": places, "sparse_value": added, "bias": values(ROWS)}
    scale = 32 / RANK
    if trained:
        tensors["scaling"] = np.float32([0.7])
        scale = np.tanh(np.float64(np.float32(0.7)))
    tensors = {f"model.l.0.q.{key}": value for key, value in tensors.items()}
    name = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    path = other(tmp_path / "tuned", tensors, name, {"r": RANK, "lora_alpha": 32})
    if suffix == ".bin":
        torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, path)
    weight = torch.from_numpy(b).double() @ torch.from_numpy(a).double() * scale
    weight.view(-1).scatter_add_(0, torch.from_numpy(places), torch.from_numpy(added).double())
    with pytest.warns(UserWarning, match="no update's"):
        spectra = ma.load_spectra(path, cache=False)
    assert_promised(spectra["sigma"].to_numpy(), np.linalg.svd(weight.numpy(), compute_uv=False))
    assert_changes(path, other(tmp_path / "base", BASE), {"model.l.0.q": weight.numpy() - WEIGHT})
    if not trained:
        (path.parent / "splora_config.json").unlink()
        with pytest.raises(AnalysisError, match=r"put its splora_config\.json beside it"):
            ma.load_spectra(path, cache=False)


def test_places_outside_of_a_weight(tmp_path):
    parts = {
        "lora_A": values(RANK, COLS),
        "lora_B": values(ROWS, RANK),
        "sparse_value": values(2),
        "scaling": values(1),
    }
    tensors = {f"q.{key}": value for key, value in parts.items()} | {"q.sparse_index": np.array([0, ROWS * COLS])}
    path = other(tmp_path / "a", tensors)
    with pytest.raises(AnalysisError, match=r"model.safetensors: tensor q.sparse_index names a place outside"):
        ma.load_spectra(path, cache=False)
    tensors["q.sparse_index"] = values(2)
    with pytest.raises(AnalysisError, match=r"tensor q\.sparse_index is of type F32; expected one of I64, I32"):
        ma.load_spectra(other(tmp_path / "b", tensors), cache=False)


# SVFT: VijayLingam95/SVFT, svft/svft_layers.py, SVFTLayer.get_weights, with the sparse matrices written out


def svft(n: int, count: int = 15) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    u, s, v = np.linalg.svd(WEIGHT.astype(float), full_matrices=False)
    u, s, v = (np.float32(one) for one in (u[:, :n], s[:n], v[:n]))
    row, col = RNG.integers(0, n, (2, count))  # the random pattern may name a place twice
    layer = {"u": u, "v": v, "s_pre": s, "s": values(count), "s_row": row, "s_col": col, "gate": np.float32([0.4])}
    layer |= {"s_pre_row": np.arange(n), "s_pre_col": np.arange(n)}
    trained = torch.sparse_coo_tensor(np.stack([row, col]), layer["s"].astype(float), (n, n)).to_dense().numpy()
    trained *= 1 / (1 + np.exp(-np.float64(np.float32(0.4))))
    u, v = u.astype(float), v.astype(float)
    after = ((np.diag(s.astype(float)) + trained) @ v).T @ u.T
    tensors = {f"model.l.0.q.svft_layer.{key}": value for key, value in layer.items()}
    return {**tensors, "lm.weight": HEAD}, u @ trained @ v, after.T


@pytest.mark.parametrize("n", [min(ROWS, COLS), 5])
@pytest.mark.filterwarnings("ignore")
def test_svft(tmp_path, n):
    tensors, update, after = svft(n)
    path = other(tmp_path / "a", tensors)
    spectra = ma.load_spectra(path, cache=False)
    exact = np.linalg.svd(update, compute_uv=False)
    assert_promised(spectra["sigma"].to_numpy(), exact[: len(spectra)])
    assert_changes(path, other(tmp_path / "base", BASE), {"model.l.0.q": after - WEIGHT})


@pytest.mark.parametrize("lost", ["u", "s_row", "gate"])
def test_svft_whose_frozen_parts_are_not_saved(tmp_path, lost):
    tensors, *_ = svft(5)
    del tensors[f"model.l.0.q.svft_layer.{lost}"]
    with pytest.raises(AnalysisError, match=f"has no {lost} beside it.*save the whole state_dict"):
        ma.load_spectra(other(tmp_path / "a", tensors), cache=False)


def test_svft_with_parts_that_do_not_fit(tmp_path):
    tensors, *_ = svft(5)
    key = "model.l.0.q.svft_layer"
    base = other(tmp_path / "base", BASE)
    with pytest.raises(AnalysisError, match=r"s_pre has shape \[4\]; expected \[5\]"):
        ma.load_spectra(other(tmp_path / "a", {**tensors, f"{key}.s_pre": values(4)}), base=base, cache=False)
    with pytest.raises(AnalysisError, match=f"unknown tensors.*{key}.other"):
        ma.load_spectra(other(tmp_path / "b", {**tensors, f"{key}.other": values(4)}), cache=False)
    empty = other(tmp_path / "empty", {**BASE, "model.l.0.q.weight": values(0, COLS)})
    with pytest.raises(AnalysisError, match=r"model.l.0.q.weight of the base has shape \[0, 12\]: empty"):
        ma.load_spectra(other(tmp_path / "c", tensors), base=empty, cache=False)


# Export with the base


def test_miss_as_a_plain_lora(tmp_path):
    adapter, base, changes = merged(tmp_path, peft.MissConfig(r=4, target_modules=["odd"]))
    ma.export(adapter, tmp_path / "plain", base=base)
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.odd.lora_{factor}.weight"].double() for factor in "AB")
    np.testing.assert_allclose((b @ a).numpy(), changes["odd"], atol=1e-6)
