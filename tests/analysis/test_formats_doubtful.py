"""Files whose shapes fit a wrong reading too: read exactly, or refused with what would tell."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import lora_config, lora_tensors, write_adapter
from safetensors.numpy import save_file

from msplora_analysis import AnalysisError
from msplora_analysis.files.opening import open_tensors
from msplora_analysis.formats import read_contents
from msplora_analysis.options import Options

torch.set_num_threads(1)


def error(path: Path, config: dict | None = None) -> str:
    with open_tensors(path) as file, pytest.raises(AnalysisError) as caught:
        read_contents(config or {}, file, Options())
    return str(caught.value)


def written(folder: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, folder / "a.safetensors", metadata)
    return folder / "a.safetensors"


def vera(outputs: dict[str, int], width: int = 8) -> dict[str, np.ndarray]:
    tensors = {"base_model.vera_A": np.ones((2, width)), "base_model.vera_B": np.ones((max(outputs.values()), 2))}
    for name, rows in outputs.items():
        key = f"base_model.model.{name}"
        tensors |= {f"{key}.vera_lambda_b": np.ones(rows), f"{key}.vera_lambda_d": np.ones(2)}
    return tensors


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        # Swin: the stages of the model have their own widths.
        ({"layers.0.query": 4, "layers.1.query": 8}, "modules called query have different sizes"),
        ({"layers.0.q": 8, "layers.0.k": 8}, "the modules are k, q"),
        ({"layer.0.crossattention.query": 8, "layer.0.crossattention.key": 8}, "layer.0.crossattention.key may read"),
        ({"layer.0.attention.dense": 8, "layer.0.output.dense": 8}, "modules called dense stand in 2 places"),
    ],
)
def test_vera_of_modules_that_may_read_other_inputs(tmp_path, outputs, reason):
    message = error(written(tmp_path, vera(outputs)), {"peft_type": "VERA"})
    assert message.startswith(reason)
    assert "give the model that it was trained on as base=" in message


def test_factors_that_only_multiply_transposed(tmp_path):
    """As PaddleNLP has them, (in, r) and (r, out), of square and of other weights."""
    for rows in (8, 4):
        file = tmp_path / "a.pt"
        torch.save({"l.0.q.lora_A": torch.ones(8, 4), "l.0.q.lora_B": torch.ones(4, rows)}, file)
        assert "their rank" in error(file)
        assert "lora_config.json" in error(file)


def test_queries_keys_and_values_of_sizes_that_are_not_in_the_file(tmp_path):
    torch.save({"h.0.attn.qkv.lora_A": torch.ones(4, 8), "h.0.attn.qkv.lora_B": torch.ones(12, 2)}, tmp_path / "a.pt")
    assert "model_config.yaml" in error(tmp_path / "a.pt")


def test_alpha_of_zero_has_two_readings(tmp_path):
    tensors = {"lora_unet_a.lora_down.weight": np.ones((2, 3)), "lora_unet_a.lora_up.weight": np.ones((3, 2))}
    file = written(tmp_path, tensors | {"lora_unet_a.alpha": np.zeros(())})
    assert error(file).startswith("tensor lora_unet_a.alpha is 0, which kohya's scripts read as the rank")


def test_dylora_of_lycoris_has_another_scale_in_training(tmp_path):
    tensors = {"lora_unet_a.lora_down.weight": np.ones((4, 3)), "lora_unet_a.lora_up.weight": np.ones((3, 4))}
    file = written(tmp_path, tensors, {"ss_network_args": json.dumps({"algo": "dylora", "block_size": "4"})})
    with open_tensors(file) as opened:
        assert any("block_size" in note for note in read_contents({}, opened, Options()).notes)


def test_mora_is_no_product(tmp_path):
    folder = write_adapter(tmp_path / "a", lora_tensors("l.0.q"), lora_config(use_mora=True))
    assert "MoRA" in error(folder / "adapter_model.safetensors", lora_config(use_mora=True))


def test_tensors_that_were_trained_whole_are_noted_once(tmp_path):
    tensors = lora_tensors("l.0.q") | {
        "base_model.model.classifier.weight": np.ones((2, 3)),
        "base_model.model.classifier.inner.extra_matrix": np.ones((2, 3)),
        "base_model.model.pooler.weight": np.ones((2, 3)),
        "base_model.model.score.w": np.ones((2, 3)),
    }
    file = write_adapter(tmp_path / "a", tensors) / "adapter_model.safetensors"
    with open_tensors(file) as opened:
        notes = read_contents(lora_config(modules_to_save=["pooler"]), opened, Options()).notes
    assert notes == [
        "4 tensors trained whole are left out: classifier.inner.extra_matrix, classifier.weight, pooler.weight, ..."
    ]


# kongds/MoRA, peft-mora/src/peft/tuners/lora/layer.py: lora_B is lora_A, of (r', r')
def test_mora_without_its_configuration(tmp_path):
    square = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    names = [f"base_model.model.l.0.q.lora_{factor}.weight" for factor in "AB"]
    assert "are one square matrix, as MoRA's are" in error(written(tmp_path, dict.fromkeys(names, square)))
    path = written(tmp_path, dict(zip(names, (square, square + 1), strict=True)))
    with open_tensors(path) as file:  # two matrices are a product, even if they are square
        assert len(read_contents({}, file, Options()).matrices) == 1
