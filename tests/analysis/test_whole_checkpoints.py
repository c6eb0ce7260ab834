"""Checkpoints of whole models with PEFT's adapters in them, as trainers leave them in folders, in several files too."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from adapters import assert_promised, lora_config, write_adapter
from safetensors.torch import save_file
from torch.distributed.checkpoint import metadata as parts_of
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from msplora_analysis import AnalysisError, load_spectra
from msplora_analysis.adapters.discovery import discover
from msplora_analysis.files.opening import open_tensors

pytestmark = pytest.mark.filterwarnings("ignore")
PEFT = "base_model.model."


def model(prefix: str = "", wrapper: str = "") -> dict[str, torch.Tensor]:
    """The state of a whole model: two adapted modules, of which base and factors are there, and a norm."""
    torch.manual_seed(0)
    state = {}
    for name, rows, cols in (("layers.0.q", 7, 5), ("layers.1.v", 4, 6)):
        key = f"{prefix}{PEFT}{name.replace('.', f'.{wrapper}', 1)}"
        state[f"{key}.base_layer.weight"] = torch.randn(rows, cols)
        state[f"{key}.lora_A.default.weight"] = torch.randn(2, cols)
        state[f"{key}.lora_B.default.weight"] = torch.randn(rows, 2)
    return state | {f"{prefix}{PEFT}norm.weight": torch.ones(3)}


def assert_read(path: Path, state: dict[str, torch.Tensor], *, step: int | None = None, run: str | None = None) -> None:
    """The path has one adapter, of the updates in ``state``."""
    (adapter,) = discover(path)
    assert adapter.step == step
    assert run in (None, adapter.run)
    spectra = load_spectra(path, cache=False)
    pairs = {key: key.replace("lora_A", "lora_B") for key in state if ".lora_A." in key}
    assert spectra["name"].nunique() == len(pairs)
    for a, b in pairs.items():
        name = a.partition(PEFT)[2].partition(".lora_A")[0].replace("_fsdp_wrapped_module.", "")
        sigma = spectra[spectra["name"] == name]["sigma"].to_numpy()
        exact = 2 * state[b].double().numpy() @ state[a].double().numpy()
        assert_promised(sigma, np.linalg.svd(exact, compute_uv=False)[:2])


def with_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(lora_config()))
    return folder


def test_trainer_and_its_shards(tmp_path):
    folder, state = with_config(tmp_path / "run/checkpoint-30"), model()
    save_file(state, folder / "model.safetensors")
    assert_read(tmp_path, state, step=30, run="run")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: state[name] for name in inside}, folder / shard)
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_read(tmp_path, state, step=30, run="run")


def test_lightning(tmp_path):
    from argparse import Namespace

    folder, state = with_config(tmp_path / "checkpoints"), model("model.")
    content = {"state_dict": state, "hyper_parameters": {"args": Namespace(a=1), "at": Path("/x"), "lr": np.float64(1)}}
    torch.save(content | {"loops": {}, "epoch": 1}, folder / "epoch=1-step=8.ckpt")
    assert_read(tmp_path, state, step=8, run="checkpoints")
    assert discover(tmp_path)[0].epoch == 1


def test_deepspeed_beside_and_without_the_adapter_alone(tmp_path):
    checkpoint, state = with_config(tmp_path / "run/checkpoint-2"), model()
    inside = checkpoint / "global_step2"
    inside.mkdir()
    (checkpoint / "latest").write_text("global_step2")
    content = {"module": state, "param_shapes": [{"x": torch.Size([2])}], "ds_version": "0.19.8", "buffer_names": []}
    torch.save(content, inside / "mp_rank_00_model_states.pt")
    assert_read(tmp_path, state, step=2, run="run")
    write_adapter(checkpoint)  # then it is a copy
    assert [adapter.file.name for adapter in discover(tmp_path)] == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("name", "what"),
    [("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32.py"), ("mp_rank_01_model_states.pt", "mp_rank_01")],
)
def test_deepspeed_in_parts_says_what_to_run(tmp_path, name, what):
    folder = with_config(tmp_path / "global_step2")
    torch.save({"module": model()}, folder / "mp_rank_00_model_states.pt")
    torch.save({"module": model()}, folder / name)
    if name.startswith("zero"):
        (folder / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(AnalysisError, match=what):
        load_spectra(tmp_path, cache=False)


def test_wrappers_of_fsdp(tmp_path):
    state = model(wrapper="_fsdp_wrapped_module.")
    torch.save(state, with_config(tmp_path / "iter_5") / "pytorch_model_fsdp.bin")
    assert_read(tmp_path, state, step=5)


# Distributed checkpoints


def saved_in_parts(folder: Path, state: dict[str, torch.Tensor], **nested: object) -> Path:
    """What two processes of FSDP write, of each tensor the first and the last rows, with PyTorch's own classes."""
    files, tensors, places, paths = [io.BytesIO(), io.BytesIO()], {}, {}, {}
    for key, tensor in state.items():
        name = f"model.{key}"
        paths[name] = ("model", key)
        cut = (len(tensor) + 1) // 2
        chunks = []
        for i, (begin, part) in enumerate(((0, tensor[:cut]), (cut, tensor[cut:]))):
            offset = torch.Size([begin] + [0] * (tensor.ndim - 1))
            chunks.append(parts_of.ChunkStorageMetadata(offset, part.shape))
            at = files[i].tell()
            torch.save(part.clone(), files[i])
            index = parts_of.MetadataIndex(name, offset, i)
            places[index] = _StorageInfo(f"__{i}_0.distcp", at, files[i].tell() - at)
        about = parts_of.TensorProperties(tensor.dtype)
        tensors[name] = parts_of.TensorStorageMetadata(about, tensor.shape, chunks)
    folder.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(files):
        (folder / f"__{i}_0.distcp").write_bytes(file.getvalue())
    metadata = parts_of.Metadata(tensors, paths, places, **nested)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def test_distributed_checkpoint_of_several_processes(tmp_path):
    state = model()
    folder = saved_in_parts(with_config(tmp_path / "iter_5"), state)
    dcp_to_torch_save(folder, tmp_path / "own.pt")
    own = torch.load(tmp_path / "own.pt")["model"]
    with open_tensors(folder / ".metadata") as file:
        assert file.shapes == {name: tuple(tensor.shape) for name, tensor in own.items()}
        for name, tensor in own.items():
            np.testing.assert_array_equal(file.read(name), tensor.numpy())
    (tmp_path / "own.pt").unlink()
    assert_read(tmp_path, state, step=5)
    assert_read(folder / ".metadata", state, step=5)


def test_distributed_checkpoint_with_an_optimiser(tmp_path):
    state = model()
    content = {"model": state, "optim": {"state": {f"{key}": {"exp_avg": torch.ones(2)} for key in state}}, "step": 3}
    dcp.save(content, checkpoint_id=tmp_path / "run/checkpoint-3/pytorch_model_fsdp_0", no_dist=True)
    with_config(tmp_path / "run/checkpoint-3")
    assert_read(tmp_path, state, step=3, run="run")


def replace(file: Path, old: bytes, new: bytes) -> None:
    file.write_bytes(file.read_bytes().replace(old, new))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (
            lambda folder: (folder / "__1_0.distcp").unlink(),
            "__1_0.distcp, .* is missing",
        ),
        (lambda folder: (folder / "__1_0.distcp").write_bytes(b""), "beyond the end"),
        (lambda folder: replace(folder / ".metadata", b"__1_0.distcp", b"../_0.distcp"), "malformed"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(print)), "it asks for builtins.print"),
        (lambda folder: (folder / ".metadata").write_bytes(b"x"), "not the list of a distributed checkpoint"),
    ],
)
def test_distributed_checkpoint_that_is_damaged(tmp_path, damage, what):
    folder = saved_in_parts(with_config(tmp_path / "iter_5"), model())
    damage(folder)
    with pytest.raises(AnalysisError, match=what) as caught:
        load_spectra(folder, cache=False)
    assert ".metadata" in str(caught.value)


# verl


@pytest.fixture
def verl(tmp_path):
    """Saves a state as verl does on FSDP 2: each of two processes its rows (DTensor), with PyTorch's own writer."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    def save(state: dict[str, torch.Tensor], axis: int = 0) -> Path:
        folder = tmp_path / "run/global_step_40/actor"
        folder.mkdir(parents=True)
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        mesh = init_device_mesh("cpu", (1,))
        for rank in range(2):
            own = {
                name: DTensor.from_local(
                    tensor.chunk(2, min(axis, tensor.ndim - 1))[rank].contiguous().clone(),
                    mesh,
                    [Shard(min(axis, tensor.ndim - 1))],
                    shape=tensor.shape,
                    stride=tensor.stride(),
                )
                for name, tensor in state.items()
            }
            torch.save(own, folder / f"model_world_size_2_rank_{rank}.pt")
        dist.destroy_process_group()
        about = {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}
        (folder / "lora_train_meta.json").write_text(json.dumps(about))
        return folder

    return save


@pytest.mark.parametrize("axis", [0, 1])
def test_verl(tmp_path, verl, axis):
    state = model()
    folder = verl(state, axis)
    assert_read(tmp_path, state, step=40)
    (folder / "model_world_size_2_rank_1.pt").rename(tmp_path / "alone.pt")
    with pytest.raises(AnalysisError, match="cut among several processes"):
        load_spectra(tmp_path / "alone.pt", cache=False)


def test_verl_with_a_file_that_is_missing(tmp_path, verl):
    folder = verl(model())
    (folder / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(AnalysisError, match=r"rank_1\.pt, which holds a part of its tensors, is missing"):
        load_spectra(tmp_path, cache=False)


def test_verl_beside_its_own_export(tmp_path, verl):
    folder = verl(model())
    write_adapter(folder / "lora_adapter")
    assert [adapter.file.parent.name for adapter in discover(tmp_path)] == ["lora_adapter"]


def test_a_base_model_is_no_adapter(tmp_path):
    save_file({"model.layers.0.q.weight": torch.ones(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(AnalysisError, match=r"it has model\.safetensors"):
        discover(tmp_path)
