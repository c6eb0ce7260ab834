"""Adapters of Megatron-Bridge, Tinker, PEFT 0.2, OpenDelta and cloneofsimo's lora, as their sources write them.

Each against dense products in float64; factors of a module are A (rank, in) and B (out, rank) here.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from adapters import assert_dense, lora_config
from safetensors.numpy import save_file

from msplora_analysis import AnalysisError, load_tables
from msplora_analysis.adapters.discovery import discover

RNG = np.random.default_rng(0)


def pair(rank: int, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.standard_normal((rank, cols), np.float32), RNG.standard_normal((rows, rank), np.float32)


def assert_read(path: Path, expected: dict[str, np.ndarray], note: str | None = None) -> None:
    """The spectra of a path are those of dense updates by their names, and its one note is this."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        spectra, metrics = load_tables(path, cache=False)
    assert len(said) == (note is not None)
    assert note is None or note in str(said[0].message)
    assert_dense(spectra, metrics, expected)


def error(path: Path) -> str:
    with pytest.raises(AnalysisError) as caught:
        load_tables(path, cache=False)
    return str(caught.value)


def written(folder: Path, config: dict, tensors: dict[str, np.ndarray], name: str = "adapter_model") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / f"{name}.safetensors")
    return folder


# PEFT 0.2


def test_enable_lora_of_peft_0_2_is_read_part_by_part(tmp_path):
    key, (a, b) = "base_model.model.h.0.attn.c_attn", pair(4, 12, 6)
    b = b[:, :2]  # two groups of rank 2, of 6 outputs each: queries and values
    config = lora_config(enable_lora=[True, False, True], fan_in_fan_out=True)
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b[:, :, None].copy()}
    # What the convolution in groups computes of an input.
    x = torch.from_numpy(a).double() @ torch.eye(6, dtype=torch.float64)
    conv = torch.nn.functional.conv1d(x, torch.from_numpy(b[:, :, None]).double(), groups=2).numpy()
    expected = {"h.0.attn.c_attn.0": 2 * conv[:6], "h.0.attn.c_attn.2": 2 * conv[6:]}
    assert_read(written(tmp_path / "a", config, tensors), expected)
    assert "tensor base_model.model.h.0.attn.c_attn.lora_A.weight" in error(
        written(tmp_path / "b", config | {"enable_lora": [True, True, True]}, tensors)
    )
    assert "enable_lora must be" in error(written(tmp_path / "c", config | {"enable_lora": "x"}, tensors))


# Tinker


@pytest.mark.parametrize("shared", ["none", "A", "B"])
def test_experts_in_one_tensor(tmp_path, shared):
    pairs = [pair(2, 7, 5) for _ in range(3)]
    a, b = np.stack([one for one, _ in pairs]), np.stack([one for _, one in pairs])
    a, b = (a[:1] if shared == "A" else a), (b[:1] if shared == "B" else b)
    key, (dense_a, dense_b) = "base_model.model.model.layers.1.mlp.experts.w1", pair(2, 4, 6)
    attention = "base_model.model.model.layers.1.self_attn.q_proj"
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    tensors |= {f"{attention}.lora_A.weight": dense_a, f"{attention}.lora_B.weight": dense_b}
    expected = {
        f"model.layers.1.mlp.experts.w1.{i}": 2 * b[min(i, len(b) - 1)] @ a[min(i, len(a) - 1)] for i in range(3)
    }
    expected["model.layers.1.self_attn.q_proj"] = 2 * dense_b @ dense_a
    assert_read(written(tmp_path / "a", lora_config(), tensors), expected)
    tensors[f"{key}.lora_B.weight"] = np.zeros((2, 7, 2), np.float32)
    if shared == "none":
        assert f"tensor {key}.lora_B.weight has shape [2, 7, 2]; expected [3, any, 2]" in error(
            written(tmp_path / "b", lora_config(), tensors)
        )


# Megatron-Bridge


def test_megatron(tmp_path):
    key = "module.decoder.layers.3"
    (a, b), (part_a, part_b) = pair(2, 12, 6), pair(2, 5, 6)
    tensors = {
        f"{key}.self_attention.linear_qkv.adapter.linear_in.weight": a,
        f"{key}.self_attention.linear_qkv.adapter.linear_out.weight": b,
        f"{key}.mlp.linear_fc1.adapter_gate.linear_in.weight": part_a,
        f"{key}.mlp.linear_fc1.adapter_gate.linear_out.weight": part_b,
    }
    expected = {
        "decoder.layers.3.self_attention.linear_qkv": 2 * b @ a,
        "decoder.layers.3.mlp.linear_fc1.gate": 2 * part_b @ part_a,
    }
    folder = written(tmp_path / "a", {"r": 2, "lora_alpha": 4}, tensors, "weights")
    assert_read(folder, expected, "fused weights")
    of_dora = {
        f"{key}.mlp.linear_fc2.adapter.linear_in.weight": a,
        f"{key}.mlp.linear_fc2.adapter.linear_out.weight": b,
    }
    of_dora[f"{key}.mlp.linear_fc2.adapter.weight_magnitude"] = np.ones(12, np.float32)
    dora = written(tmp_path / "dora", {"r": 2, "lora_alpha": 4}, of_dora, "weights")
    assert_read(dora, {"decoder.layers.3.mlp.linear_fc2": 2 * b @ a}, "DoRA")
    (folder / "adapter_config.json").unlink()
    assert "alpha / dim" in error(folder)


def test_megatron_in_a_distributed_checkpoint_with_all_layers_in_one_tensor(tmp_path):
    pairs = [pair(2, 4, 6) for _ in range(3)]
    folder = tmp_path / "run/iter_0000005"
    key = "decoder.layers.mlp.linear_fc2.adapter"
    state = {
        f"{key}.linear_in.weight": torch.from_numpy(np.stack([one for one, _ in pairs])),
        f"{key}.linear_out.weight": torch.from_numpy(np.stack([one for _, one in pairs])),
        "decoder.final_layernorm.weight": torch.ones(3),
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    # As ConfigContainer.to_yaml of Megatron-Bridge writes it, with yaml.safe_dump.
    peft = {"_target_": "megatron.bridge.peft.lora.LoRA", "alpha": 6, "dim": 2, "target_modules": ["linear_fc2"]}
    settings = {
        "_target_": "ConfigContainer",
        "model": {"alpha": 9, "inner": {"dim": 7}},
        "peft": peft,
        "rng": {"dim": 8},
    }
    (folder / "run_config.yaml").write_text(yaml.safe_dump(settings, default_flow_style=False))
    assert_read(tmp_path, {f"decoder.layers.{i}.mlp.linear_fc2": 3 * b @ a for i, (a, b) in enumerate(pairs)})
    assert discover(tmp_path)[0].step == 5
    (folder / "run_config.yaml").unlink()
    assert "copy the checkpoint's run_config.yaml beside it" in error(tmp_path)


# OpenDelta


def test_opendelta(tmp_path):
    (a, b), key = pair(2, 7, 5), "roberta.encoder.layer.0.attention.self.query.lora"
    torch.save(
        {f"{key}.lora_A": torch.from_numpy(a), f"{key}.lora_B": torch.from_numpy(b)}, tmp_path / "pytorch_model.bin"
    )
    config = {"delta_type": "lora", "lora_r": 2, "lora_alpha": 16, "modified_modules": ["query"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_read(tmp_path, {"roberta.encoder.layer.0.attention.self.query": 8 * b @ a})
    (tmp_path / "config.json").write_text(json.dumps(config | {"lora_alpha": None}))
    assert "lora_alpha is missing" in error(tmp_path)


# cloneofsimo's lora


def test_cloneofsimo(tmp_path):
    pairs = [pair(2, 7, 5), pair(2, 4, 6)]
    listed = [torch.from_numpy(one) for a, b in pairs for one in (b, a)]
    torch.save(listed, tmp_path / "lora_weight.pt")
    assert_read(tmp_path / "lora_weight.pt", {f"lora.{i}": b @ a for i, (a, b) in enumerate(pairs)}, "no names")
    tensors = {f"unet:{i}:{part}": one for i, (a, b) in enumerate(pairs) for part, one in (("up", b), ("down", a))}
    tensors["<s1>"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"unet": "[]", "unet:0:rank": "2", "<s1>": "<embed>"})
    assert_read(tmp_path / "x.safetensors", {f"unet.{i}": b @ a for i, (a, b) in enumerate(pairs)}, "no names")
    torch.save(listed[:3], tmp_path / "odd.pt")
    assert "got list" in error(tmp_path / "odd.pt")
