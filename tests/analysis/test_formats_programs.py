"""Adapters of MLX-LM, llama.cpp, litgpt and AdapterHub, of the shapes that their sources give, against dense products.

Factors of a module are A (rank, in) and B (out, rank) here, whatever a program makes of them.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import assert_dense, lora_tensors, write_adapter
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from msplora_analysis import AnalysisError, load_spectra, load_tables
from msplora_analysis.adapters.discovery import discover
from msplora_analysis.files.opening import open_tensors

torch.set_num_threads(1)
RNG = np.random.default_rng(0)
NAME = "model.layers.3.self_attn.q_proj"


def pair(rank: int, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.standard_normal((rank, cols), np.float32), RNG.standard_normal((rows, rank), np.float32)


def assert_read(path: Path, expected: dict[str, np.ndarray], notes: int = 0) -> None:
    """The spectra of a path are those of dense updates by their names."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        spectra, metrics = load_tables(path, cache=False)
    assert len(said) == notes
    assert_dense(spectra, metrics, expected)


def error(path: Path) -> str:
    with pytest.raises(AnalysisError) as caught:
        load_spectra(path, cache=False)
    return str(caught.value)


# MLX-LM


def mlx(folder: Path, tensors: dict[str, np.ndarray], name: str = "adapters", **parameters) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / f"{name}.safetensors")
    parameters = {"rank": 2, "dropout": 0.0, "scale": 20.0, **parameters}
    config = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_mlx(tmp_path):
    (a, b), (word_a, word_b) = pair(2, 6, 5), pair(2, 7, 4)
    experts = [pair(2, 6, 5) for _ in range(3)]
    moe = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {
        f"{NAME}.lora_a": a.T,
        f"{NAME}.lora_b": b.T,
        "model.embed_tokens.lora_a": word_a.T,
        "model.embed_tokens.lora_b": word_b.T,
        f"{moe}.lora_a": np.stack([one for one, _ in experts]),
        f"{moe}.lora_b": np.stack([one for _, one in experts]),
    }
    expected = {NAME: 20 * b @ a, "model.embed_tokens": 20 * word_b @ word_a}
    expected |= {f"{moe}.{i}": 20 * one_b @ one_a for i, (one_a, one_b) in enumerate(experts)}
    assert_read(mlx(tmp_path / "a", tensors), expected)


def test_mlx_steps_dora_and_a_scale_that_is_missing(tmp_path):
    a, b = pair(2, 6, 5)
    tensors = {f"{NAME}.lora_a": a.T, f"{NAME}.lora_b": b.T}
    mlx(tmp_path / "run", tensors, "0000100_adapters")
    mlx(tmp_path / "run", tensors)
    assert [(one.run, one.step) for one in discover(tmp_path)] == [("run", 100), ("run", None)]
    assert_read(mlx(tmp_path / "dora", {**tensors, f"{NAME}.m": np.ones(6)}), {NAME: 20 * b @ a}, notes=1)
    assert "lora_parameters has no scale" in error(_without_scale(mlx(tmp_path / "b", tensors)))


def _without_scale(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 2, "alpha": 4}}))
    return folder


# llama.cpp


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    types = {"F32": "f4", "F16": "f2", "BF16": None, "Q8_0": None}
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6)
    writer.add_array("adapter.tags", ["a", "b"])
    writer.add_array("adapter.numbers", [1, 2, 3])
    expected = {}
    for i, name in enumerate(types):
        kind = gguf.GGMLQuantizationType[name]
        factors = []
        for key, values in zip("ab", pair(32, 64, 96), strict=True):
            stored = values if name == "F32" else gguf.quants.quantize(values, kind)
            writer.add_tensor(f"blk.{i}.attn_q.weight.lora_{key}", stored, raw_dtype=kind)
            factors.append(gguf.quants.dequantize(stored, kind).reshape(values.shape).astype(float))
        expected[f"blk.{i}.attn_q"] = 6 / 32 * factors[1] @ factors[0]
    experts = [pair(2, 6, 5) for _ in range(3)]
    for key, values in (("a", [a for a, _ in experts]), ("b", [b for _, b in experts])):
        writer.add_tensor(f"blk.0.ffn_up_exps.weight.lora_{key}", np.stack(values))
    expected |= {f"blk.0.ffn_up_exps.{i}": 3 * b @ a for i, (a, b) in enumerate(experts)}
    a, b = pair(2, 6, 9)
    writer.add_tensor("token_embd.weight.lora_a", np.ascontiguousarray(a.T))
    writer.add_tensor("token_embd.weight.lora_b", b)
    expected["token_embd"] = 3 * b @ a
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_read(tmp_path, expected)
    content = (tmp_path / "lora.gguf").read_bytes()
    for size in (3, 20, 100, len(content) // 2, len(content) - 40):
        (tmp_path / "lora.gguf").write_bytes(content[:size])
        assert "not a complete GGUF file" in error(tmp_path / "lora.gguf")


def test_gguf_of_a_whole_model(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type("model")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "it is no adapter" in error(tmp_path / "model.gguf")
    assert "no adapter found" in error(tmp_path)


# litgpt


def litgpt(folder: Path, tensors: dict[str, np.ndarray], model: str) -> Path:
    folder.mkdir(exist_ok=True)
    named = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({"model": named}, folder / "lit_model.pth.lora")
    (folder / "model_config.yaml").write_text(model)
    training = "lora_r: 2\nlora_alpha: 6\nlora_query: true\nlora_key: false\nlora_value: true\ntrain:\n  lora_r: 9\n"
    (folder / "hyperparameters.yaml").write_text(training)
    return folder


def test_litgpt_with_grouped_queries(tmp_path):
    (query, key), (value, other), (a, b) = pair(2, 16, 5), pair(2, 4, 5), pair(2, 7, 5)
    prefix = "transformer.h.1"
    tensors = {
        f"{prefix}.attn.qkv.lora_A": np.concatenate([query, value]),
        f"{prefix}.attn.qkv.lora_B": np.concatenate([key, other]),
        f"{prefix}.attn.proj.lora_A": a,
        f"{prefix}.attn.proj.lora_B": b,
    }
    folder = litgpt(tmp_path / "final", tensors, "head_size: 4\nn_head: 4\nn_query_groups: 1\nname: x\n")
    expected = {
        f"{prefix}.attn.qkv.query": 3 * key @ query,
        f"{prefix}.attn.qkv.value": 3 * other @ value,
        f"{prefix}.attn.proj": 3 * b @ a,
    }
    assert_read(folder, expected)
    (folder / "model_config.yaml").unlink()
    assert "model_config.yaml: head_size must be" in error(folder)


# AdapterHub


def adapterhub(folder: Path, tensors: dict[str, np.ndarray], **about) -> Path:
    folder.mkdir(exist_ok=True)
    named = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save(named, folder / "pytorch_adapter.bin")
    about = {"architecture": "lora", "alpha": 6, "r": 2, "composition_mode": "add", "use_gating": False, **about}
    (folder / "adapter_config.json").write_text(json.dumps({"config": about, "name": "task", "hidden_size": 8}))
    return folder


def test_adapterhub(tmp_path):
    a, b = pair(2, 6, 5)
    name = "bert.encoder.layer.0.attention.self.query"
    tensors = {f"{name}.loras.task.lora_A": a, f"{name}.loras.task.lora_B": b}
    folder = adapterhub(tmp_path / "a", tensors)
    assert_read(folder, {name: 3 * b @ a})
    assert_read(folder / "pytorch_adapter.bin", {name: 3 * b @ a})
    for about in ({"use_gating": True}, {"composition_mode": "scale"}, {"vera_d": 0.1}, {"alpha": None}):
        assert next(iter(about)) in error(adapterhub(tmp_path / "b", tensors, **about))
    (folder / "adapter_config.json").unlink()
    assert "without its adapter_config.json" in error(folder)
    prefix = adapterhub(tmp_path / "c", {"l.0.prefix_tunings.task.wte.weight": a}, architecture="prefix_tuning")
    assert "of architecture prefix_tuning: of its methods LoRA alone" in error(prefix)


# PaddleNLP


@pytest.mark.parametrize(("about", "scale"), [({}, 3), ({"rslora": True}, 6 / 2**0.5), ({"pissa": True}, 1)])
def test_paddlenlp(tmp_path, about, scale):
    a, b = pair(2, 6, 6)  # square: it would multiply the other way too
    tensors = {f"{NAME}.lora_A": np.ascontiguousarray(a.T), f"{NAME}.lora_B": np.ascontiguousarray(b.T)}
    save_file(tensors, tmp_path / "peft_model-00001-of-00001.safetensors")
    (tmp_path / "lora_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, **about}))
    assert_read(tmp_path, {NAME: scale * b @ a}, notes="pissa" in about)
    (tmp_path / "lora_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "tensor_parallel_degree": 2}))
    assert "merge_tensor_parallel" in error(tmp_path)


# torchtune


def test_torchtune(tmp_path):
    a, b = pair(2, 6, 5)
    name = "layers.0.attn.q_proj"
    tensors = {f"{name}.lora_a.weight": torch.from_numpy(a), f"{name}.lora_b.weight": torch.from_numpy(b)}
    torch.save(tensors, tmp_path / "adapter_0.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    assert_read(tmp_path, {name: 3 * b @ a})
    torch.save({**tensors, f"{name}.magnitude": torch.ones(6)}, tmp_path / "adapter_0.pt")
    assert_read(tmp_path, {name: 3 * b @ a}, notes=1)
    (tmp_path / "adapter_config.json").unlink()
    assert "r is missing" in error(tmp_path)


# Numbers of 8 bits, and embeddings beside a LoRA


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_number_of_8_bits(tmp_path, kind):
    values = torch.arange(256, dtype=torch.uint8).view(kind)
    save_torch({"x": values}, tmp_path / "a.safetensors")
    torch.save({"x": values}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        with open_tensors(tmp_path / name) as file:
            assert np.array_equal(file.read("x"), values.float().numpy(), equal_nan=True)


def test_embeddings_bundled_with_a_lora(tmp_path):
    a, b = pair(2, 6, 5)
    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": np.array(6.0)}
    save_file({**tensors, "bundle_emb.style.string_to_param.*": np.ones((2, 8))}, tmp_path / "style.safetensors")
    assert_read(tmp_path, {"unet.mid_block.attentions.0.proj_in": 3 * b @ a}, notes=1)


def test_what_stands_between_the_factors_is_not_to_be_ignored(tmp_path):
    tensors = lora_tensors("layer.0.q") | {"base_model.model.layer.0.q.gate": np.ones(2)}
    message = error(write_adapter(tmp_path / "a", tensors))
    assert "may change their updates" in message
    assert "ignore" not in message


# Whole checkpoints of a model with PEFT's adapters


@pytest.mark.parametrize(("name", "prefix"), [("model.safetensors", ""), ("last.ckpt", "model.")])
def test_whole_checkpoints_with_adapters(tmp_path, name, prefix):
    peft = pytest.importorskip("peft")
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(5, 6), "v": torch.nn.Linear(5, 6)})
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q"], init_lora_weights=False)
    )
    tensors = {prefix + key: value.detach() for key, value in model.state_dict().items()}
    file = tmp_path / name
    if name.endswith(".ckpt"):
        torch.save({"epoch": 1, "global_step": 2, "state_dict": tensors}, file)
    else:
        save_torch(tensors, file)
    assert "adapter_config.json beside it" in error(file)
    model.peft_config["default"].save_pretrained(tmp_path)
    delta = model.base_model.model.q.get_delta_weight("default").detach().numpy()
    assert_read(file, {"q": delta}, notes=1)
