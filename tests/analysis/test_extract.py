"""LoRAs out of full fine-tunings: against dense singular value decompositions, and as PEFT loads them."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_full import bert, llama, tuned
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis import AnalysisError, cli
from msplora_analysis.compute.linalg import best as linalg
from msplora_analysis.compute.linalg.best import best
from msplora_analysis.files.opening import open_checkpoint
from msplora_analysis.write import extract
from msplora_analysis.write.work import Work

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
torch.set_num_threads(1)


# The best approximation


def with_spectrum(rows, cols, sigma, seed=0):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, len(sigma))))[0] for n in (rows, cols))
    return left * sigma @ right.T


def noise(rows, cols):
    return np.random.default_rng(0).standard_normal((rows, cols))


MATRICES = {
    "decay": lambda: with_spectrum(420, 300, np.arange(1, 301) ** -0.7),
    "wide": lambda: with_spectrum(300, 420, np.arange(1, 301) ** -1.0),
    "flat": lambda: noise(400, 320),
    "low rank, and noise": lambda: with_spectrum(400, 300, np.linspace(3, 1, 6)) + 1e-3 * noise(400, 300),
    "exactly low rank": lambda: with_spectrum(400, 300, np.linspace(3, 1, 5)),
    "all equal": lambda: np.eye(400, 300),
    "huge": lambda: 1e200 * noise(400, 300),
    "tiny": lambda: 1e-200 * noise(400, 300),
}


@pytest.mark.parametrize("small", [64, 1024], ids=["krylov", "eigenvectors"])
@pytest.mark.parametrize("case", MATRICES)
def test_no_approximation_is_better(case, small, monkeypatch):
    monkeypatch.setattr(linalg, "_SMALL", small)
    matrix = MATRICES[case]()
    scale = np.abs(matrix).max()
    unit = matrix / scale
    sigma = np.linalg.svd(unit, compute_uv=False)
    for rank in (1, 8):
        found = best(matrix, rank=rank)
        assert len(found.sigma) == min(rank, 5 if case == "exactly low rank" else rank)
        error = np.linalg.norm(unit - found.left * (found.sigma / scale) @ found.right)
        least = np.linalg.norm(sigma[rank:])
        assert error <= max(least * (1 + 1e-6), least + 1e-7 * np.linalg.norm(sigma))
    if case != "all equal":  # where any tenth is as good as another, rounding decides
        for energy in (0.3, 0.9):
            least = 1 + np.searchsorted(np.cumsum(sigma**2), energy * np.sum(sigma**2))
            assert len(best(matrix, energy=energy).sigma) == least


def test_krylov_stops_before_the_eigenvectors(monkeypatch):
    monkeypatch.setattr(linalg, "_SMALL", 64)
    monkeypatch.setattr(linalg, "_by_eigenvectors", None)
    for case in ("decay", "low rank, and noise", "exactly low rank"):
        assert len(best(MATRICES[case](), rank=4).sigma) == 4


def test_torch_gives_what_numpy_does():
    for matrix in (MATRICES["decay"](), with_spectrum(1400, 1100, np.arange(1, 301) ** -0.7)):
        for options in ({"rank": 6}, {"energy": 0.8}):
            ours, theirs = best(matrix, **options), best(torch.from_numpy(matrix), **options)
            assert isinstance(theirs.left, np.ndarray)
            np.testing.assert_allclose(theirs.sigma, ours.sigma, rtol=1e-9)
            product, other = ((one.left * one.sigma) @ one.right for one in (ours, theirs))
            np.testing.assert_allclose(product, other, atol=1e-6 * ours.sigma[0])


# Models, as PEFT loads the adapter on their base


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=16)
    )


def save(folder, model, **options):
    model.save_pretrained(folder, **options)
    return folder


def dense(name, after, before, rank):
    """The best approximation of rank ``rank`` of the change of a weight, as it is stored."""
    after, before = (dict(model.named_parameters())[f"{name}.weight"].detach().double() for model in (after, before))
    u, sigma, vt = torch.linalg.svd(after - before, full_matrices=False)
    return (u[:, :rank] * sigma[:rank] @ vt[:rank]).numpy(), float(sigma[rank:].norm() / sigma.norm())


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_every_layer_has_the_best_update(make, tmp_path):
    before = make()
    after = tuned(before)
    base = save(tmp_path / "base", before)
    table = ma.extract(save(tmp_path / "tuned", after, max_shard_size="20KB"), tmp_path / "lora", base=base, rank=3)
    low = table[table["kept"] == "low rank"].set_index("name")
    layers = [name for name, module in before.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert set(low.index) == {name for name in layers if name not in ("lm_head", "classifier")}
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / "lora")
    for name in low.index:
        update = loaded.base_model.model.get_submodule(name).get_delta_weight("default").detach().numpy()
        expected, error = dense(name, after, before, 3)
        np.testing.assert_allclose(update, expected, atol=1e-6)
        assert low.loc[name, "error"] == pytest.approx(error, rel=1e-5)
        assert low.loc[name, "rank"] == 3


def test_with_all_ranks_and_the_rest_saved_whole_it_is_the_tuned_model(tmp_path):
    before = bert()
    after = tuned(before)
    base = save(tmp_path / "base", before.bert)  # without a head: it is saved by itself
    whole = ["word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"]
    table = ma.extract(save(tmp_path / "tuned", after), tmp_path / "lora", base=base, energy=1.0, modules_to_save=whole)
    assert set(table["kept"]) == {"low rank", "whole", "left out"}
    assert set(table.loc[table["kept"] == "left out", "name"].str.rpartition(".")[2]) == {"bias"}
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == sorted([*whole, "classifier"])
    assert config["task_type"] == "SEQ_CLS"
    with torch.no_grad():
        for name, parameter in after.named_parameters():  # biases of linear layers are no part of a LoRA
            if name in set(table.loc[table["kept"] == "left out", "name"]):
                parameter.copy_(dict(before.named_parameters())[name])
    loaded = peft.PeftModel.from_pretrained(before, tmp_path / "lora").eval()
    words = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(words).logits, after.eval()(words).logits, atol=1e-5, rtol=1e-5)


def test_ranks_differ_by_energy_and_the_scale_is_one(tmp_path):
    before = llama()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for i, layer in enumerate(after.model.layers):
            layer.self_attn.q_proj.weight += torch.randn(32, i + 1) @ torch.randn(i + 1, 32)
    table = ma.extract(
        save(tmp_path / "tuned", after), tmp_path / "lora", base=save(tmp_path / "base", before), energy=0.9999
    )
    low = table[table["kept"] == "low rank"]
    assert list(low["rank"]) == [1, 2]
    assert (table.loc[table["kept"] != "low rank", "kept"] == "unchanged").all()
    assert (low["error"] < 0.011).all()
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^model\.layers\.0\.self_attn\.q_proj": 1}
    assert config["r"] == config["lora_alpha"] == 2
    read = ma.load_spectra(tmp_path / "lora", cache=False)
    update = torch.from_numpy(dense("model.layers.1.self_attn.q_proj", after, before, 2)[0])
    expected = torch.linalg.svdvals(update)[:2]
    np.testing.assert_allclose(read.loc[read["group"] == 1, "sigma"], expected, rtol=1e-5)


def test_shards_and_pickles_give_the_same_bytes(tmp_path):
    before = llama()
    after = tuned(before)
    base = save(tmp_path / "base", before)
    shards = save(tmp_path / "shards", after, max_shard_size="20KB")
    (tmp_path / "bin").mkdir()
    torch.save(after.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    shutil.copy(shards / "config.json", tmp_path / "bin")
    written = []
    for model in (shards, tmp_path / "bin"):
        ma.extract(model, tmp_path / "lora", base=base, rank=2, overwrite=True)
        written.append(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    one, two = written
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_what_is_left_out_is_told(tmp_path, monkeypatch):
    before = llama(tie_word_embeddings=False)
    after = tuned(before)
    after.resize_token_embeddings(55)
    base, model = save(tmp_path / "base", before), save(tmp_path / "tuned", after)
    command = ["extract", str(model), "--base", str(base), "--out", str(tmp_path / "lora"), "--rank", "2"]
    with pytest.warns(UserWarning, match=r"embed_tokens.weight has shape \[55, 32\], in the base \[50, 32\]"):
        result = CliRunner().invoke(cli.make_app(), command)
    assert result.exit_code == 0, result.output
    assert "left out (7)" in result.output
    assert "lm_head.weight" in result.output
    table = ma.extract(
        model, tmp_path / "whole", base=base, rank=2, modules_to_save=["embed_tokens", "lm_head", "model.norm"]
    )
    left = table[table["kept"] == "left out"]
    assert set(left["module"]) == {"input_layernorm", "post_attention_layernorm"}
    norm = [model.model.layers[0].input_layernorm.weight.detach() for model in (before, after)]
    change = float((norm[1] - norm[0]).double().norm())
    row = left[left["name"] == "model.layers.0.input_layernorm.weight"].iloc[0]
    assert row["norm"] == pytest.approx(change, rel=1e-6)
    assert row["relative"] == pytest.approx(change / float(norm[0].double().norm()), rel=1e-6)
    before.resize_token_embeddings(55)
    loaded = peft.PeftModel.from_pretrained(before, tmp_path / "whole")
    saved = loaded.get_input_embeddings().modules_to_save["default"].weight
    assert torch.equal(saved, after.get_input_embeddings().weight)


def test_a_call_that_was_ended_goes_on(tmp_path, monkeypatch):
    before = llama()
    base, model = save(tmp_path / "base", before), save(tmp_path / "tuned", tuned(before))
    ma.extract(model, tmp_path / "at once", base=base, rank=2)
    calls = []

    def ended(*args, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return best(*args, **options)

    monkeypatch.setattr(extract, "best", ended)
    command = ["extract", str(model), "--base", str(base), "--out", str(tmp_path / "lora"), "--rank", "2"]
    result = CliRunner().invoke(cli.make_app(), command)
    assert result.exit_code == 130
    assert "lora.unfinished; the same command goes on" in result.stderr
    assert not (tmp_path / "lora").exists()
    assert len(list((tmp_path / "lora.unfinished").glob("*.safetensors"))) == 5
    result = CliRunner().invoke(cli.make_app(), command)
    assert "kept from an earlier call: 5 tensors" in result.output
    assert len(calls) == 6 + 14 - 5
    assert not (tmp_path / "lora.unfinished").exists()
    for name in ("adapter_model.safetensors", "adapter_config.json", "ranks.csv"):
        assert (tmp_path / "lora" / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()

    calls[:] = [1]
    with pytest.raises(KeyboardInterrupt):
        ma.extract(model, tmp_path / "other", base=base, rank=2)
    calls[:] = [1] * 10
    assert (ma.extract(model, tmp_path / "other", base=base, rank=3)["rank"].max()) == 3  # begun anew
    assert len(calls) == 10 + 14


@pytest.mark.skipif(os.name != "posix", reason="locks are those of POSIX")
def test_of_two_calls_at_once_the_second_is_refused(tmp_path):
    before = llama()
    base, model = save(tmp_path / "base", before), save(tmp_path / "tuned", tuned(before))
    another = Work(tmp_path / "lora.unfinished", {"job": "another, of other ranks"})
    with another, pytest.raises(ma.AnalysisError, match="another call is at work there"):
        ma.extract(model, tmp_path / "lora", base=base, rank=2)
    ma.extract(model, tmp_path / "lora", base=base, rank=2)


def test_the_error_is_that_of_the_factors_as_written(tmp_path):
    before = llama()
    base, model = save(tmp_path / "base", before), save(tmp_path / "tuned", tuned(before))
    table = ma.extract(model, tmp_path / "lora", base=base, rank=32, dtype="bfloat16")
    low = table[table["kept"] == "low rank"]
    assert low["error"].between(1e-4, 1e-2).all()
    with open_checkpoint(tmp_path / "lora" / "adapter_model.safetensors") as file:
        name = "model.layers.1.mlp.up_proj"
        a, b = (file.read(f"base_model.model.{name}.lora_{factor}.weight").astype(float) for factor in "AB")
    with open_checkpoint(model) as after, open_checkpoint(base) as first:
        change = after.read(f"{name}.weight").astype(float) - first.read(f"{name}.weight")
    error = np.linalg.norm(change - b @ a) / np.linalg.norm(change)
    assert low.set_index("name").loc[name, "error"] == pytest.approx(error, rel=1e-9)


def test_convolutions(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("base", "tuned"):
        (tmp_path / folder).mkdir()
        tensors = {"conv.weight": rng.normal(size=(6, 4, 3, 3)), "depthwise.weight": rng.normal(size=(6, 1, 3, 3))}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    table = ma.extract(tmp_path / "tuned", tmp_path / "lora", base=tmp_path / "base", rank=2, dtype="float64")
    assert dict(zip(table["name"], table["kept"], strict=True)) == {
        "conv": "low rank",
        "depthwise.weight": "left out",
    }
    model = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 6, 3, bias=False, dtype=torch.float64)})
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    update = loaded.base_model.model["conv"].get_delta_weight("default").detach().numpy()
    after, before = (load_file(tmp_path / folder / "model.safetensors")["conv.weight"] for folder in ("tuned", "base"))
    error = np.linalg.norm(update - (after - before)) / np.linalg.norm(after - before)
    assert error == pytest.approx(table.loc[0, "error"], rel=1e-6)


def test_conv1d_without_a_configuration(tmp_path):
    before = gpt2()
    base, model = save(tmp_path / "base", before), save(tmp_path / "tuned", tuned(before))
    ma.extract(model, tmp_path / "lora", base=base, rank=2)
    for folder in (base, model):
        (folder / "config.json").unlink()
    ma.extract(model, tmp_path / "bare", base=base, rank=2)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "bare"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


# What cannot be done


def test_bad_input_is_one_line(tmp_path):
    before = llama()
    base, model = save(tmp_path / "base", before), save(tmp_path / "tuned", tuned(before))

    def error(*args, **options) -> str:
        with pytest.raises(AnalysisError) as caught:
            ma.extract(*args, **{"base": base, "rank": 2, **options})
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "lora").exists()
        return str(caught.value)

    out = tmp_path / "lora"
    assert "rank= and energy=" in error(model, out, energy=0.5)
    assert "energy=1.5" in error(model, out, rank=None, energy=1.5)
    assert "modules_to_save=words" in error(model, out, modules_to_save=["words"])
    nested = error(model, out, modules_to_save=["mlp", "up_proj"])
    assert "model.layers.0.mlp and model.layers.0.mlp.up_proj inside it" in nested
    assert "device=nowhere" in error(model, out, device="nowhere")
    assert "nothing to extract" in error(base, out)
    assert "not empty" in error(model, base)
    ma.extract(model, tmp_path / "adapter", base=base, rank=2)
    assert "an adapter already" in error(tmp_path / "adapter", out)
    (tmp_path / "lora.unfinished").mkdir()
    assert "move it away" in error(model, out)
    (tmp_path / "lora.unfinished").rmdir()
    for tensor in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        spoilt = load_file(model / "model.safetensors")
        spoilt[tensor] = np.full_like(spoilt[tensor], np.nan)
        (tmp_path / "spoilt").mkdir(exist_ok=True)
        save_file(spoilt, tmp_path / "spoilt" / "model.safetensors")
        assert tensor in error(tmp_path / "spoilt", out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_parts_of_tensors(tmp_path, dtype):
    from safetensors.torch import save_file as save_torch_file

    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_torch_file({"a": torch.zeros(3, dtype=dtype), "b": tensor}, tmp_path / "model.safetensors")
    torch.save({"b": tensor}, tmp_path / "model.bin")
    for name in ("model.safetensors", "model.bin"):
        with open_checkpoint(tmp_path / name) as file:
            part = file.read_part("b", 3, 30)
            assert np.array_equal(part, file.read("b").reshape(-1)[3:30])
            assert np.array_equal(file.read_part("b", 30, 99), file.read("b").reshape(-1)[30:])
