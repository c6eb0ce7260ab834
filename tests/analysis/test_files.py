import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from adapters import lora_tensors, write_adapter
from safetensors.numpy import save_file

from msplora_analysis import AnalysisError
from msplora_analysis.adapters.discovery import discover
from msplora_analysis.files.addresses import natural_key
from msplora_analysis.files.opening import open_tensors


def found(*paths: Path) -> list[tuple]:
    return [(a.run, a.step, a.epoch) for a in discover(paths)]


def test_run_folder_lists_its_checkpoints_in_order_of_steps(tmp_path):
    run = tmp_path / "cola"
    for epoch, step in enumerate((0, 500, 1000, 1500)):
        write_adapter(run / f"checkpoint-{step}", epoch=epoch)
    assert found(run) == [("cola", 0, 0), ("cola", 500, 1), ("cola", 1000, 2), ("cola", 1500, 3)]
    assert all(type(a.epoch) is int for a in discover(run))


def test_paths_may_be_strings_paths_or_a_single_one(tmp_path):
    folder = write_adapter(tmp_path / "a")
    assert discover(str(folder)) == discover(folder) == discover([folder]) == discover(p for p in [str(folder)])


def test_fractional_epoch_stays_a_float(tmp_path):
    write_adapter(tmp_path / "run" / "checkpoint-7", epoch=0.5)
    assert found(tmp_path / "run") == [("run", 7, 0.5)]


@pytest.mark.parametrize("state", [None, "{}", '{"epoch": null}'])
def test_epoch_is_empty_without_a_state_that_tells_it(tmp_path, state):
    folder = write_adapter(tmp_path / "run" / "checkpoint-7")
    if state:
        (folder / "trainer_state.json").write_text(state)
    assert found(tmp_path) == [("run", 7, None)]


def test_adapter_in_the_root_of_a_run_is_kept_without_step_and_epoch(tmp_path):
    run = tmp_path / "run"
    write_adapter(run / "checkpoint-10", epoch=1)
    write_adapter(run, epoch=1)
    assert found(run) == [("run", 10, 1), ("run", None, None)]


def test_folder_of_runs_names_them_by_relative_path_in_natural_order(tmp_path):
    for name in ("cola/lora-10", "cola/lora-9", "mrpc/msplora"):
        write_adapter(tmp_path / "runs" / name / "checkpoint-5", epoch=1)
    runs = [run for run, *_ in found(tmp_path / "runs")]
    assert runs == ["cola/lora-9", "cola/lora-10", "mrpc/msplora"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("cola", ("cola", 5, 1)),
        ("cola/checkpoint-5", ("cola", 5, 1)),
        ("cola/checkpoint-5/adapter_model.safetensors", ("cola", 5, 1)),
        ("plain", ("plain", None, None)),
        ("plain/adapter_model.safetensors", ("plain", None, None)),
    ],
)
def test_a_given_folder_or_file_is_named_by_its_run_folder(tmp_path, path, expected):
    write_adapter(tmp_path / "cola" / "checkpoint-5", epoch=1)
    write_adapter(tmp_path / "plain")
    assert found(tmp_path / path) == [expected]


def test_relative_paths_are_named_by_the_folders_they_mean(tmp_path, monkeypatch):
    write_adapter(tmp_path / "cola" / "checkpoint-5", epoch=1)
    monkeypatch.chdir(tmp_path / "cola" / "checkpoint-5")
    assert found(Path(".")) == found(Path("..")) == [("cola", 5, 1)]


def test_colliding_names_get_more_leading_folders(tmp_path):
    for name in ("a/x/lora", "b/x/lora", "b/y/msplora"):
        write_adapter(tmp_path / name / "checkpoint-5", epoch=1)
    paths = [tmp_path / "a/x/lora", tmp_path / "b/x/lora", tmp_path / "b/y/msplora"]
    assert [run for run, *_ in found(*paths)] == ["a/x/lora", "b/x/lora", "msplora"]
    assert [run for run, *_ in found(tmp_path / "a", tmp_path / "b")] == ["a/x/lora", "b/x/lora", "y/msplora"]


def test_the_same_folder_given_twice_or_through_a_link_is_one(tmp_path):
    run = write_adapter(tmp_path / "runs" / "cola" / "checkpoint-5", epoch=1).parent
    (tmp_path / "link").symlink_to(run)
    file = run / "checkpoint-5" / "adapter_model.safetensors"
    assert len(discover([run, run, tmp_path / "runs", tmp_path / "link", file])) == 1
    assert found(file, tmp_path / "runs") == [("cola", 5, 1)]


def test_folder_of_links_to_adapters_elsewhere(tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(write_adapter(tmp_path / "elsewhere" / "adapter"))
    assert found(tmp_path / "links") == [("a", None, None)]


def test_loops_of_links_end(tmp_path):
    run = write_adapter(tmp_path / "run" / "checkpoint-5", epoch=1).parent
    (run / "loop").symlink_to(tmp_path)
    (run / "checkpoint-5" / "self").symlink_to("self")
    (run / "broken").symlink_to("nowhere")
    assert found(tmp_path) == [("run", 5, 1)]


def test_weights_that_are_links_are_taken_with_the_config_beside_the_link(tmp_path):
    folder = write_adapter(tmp_path / "snapshot")
    weights = folder / "adapter_model.safetensors"
    os.rename(weights, tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    assert discover(folder)[0].file == weights


def test_safetensors_are_preferred_to_bin(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    assert discover(folder)[0].file.name == "adapter_model.safetensors"


def test_adapter_of_another_name_inside_a_checkpoint_keeps_its_step(tmp_path):
    write_adapter(tmp_path / "run" / "checkpoint-5" / "expert")
    (tmp_path / "run" / "checkpoint-5" / "trainer_state.json").write_text('{"epoch": 2.0}')
    assert found(tmp_path) == [("run/expert", 5, 2)]


def test_files_of_other_names_in_one_folder_are_runs_of_their_own(tmp_path):
    folder = write_adapter(tmp_path / "a")
    data = (folder / "adapter_model.safetensors").read_bytes()
    for name in ("one", "two"):
        (folder / f"{name}.safetensors").write_bytes(data)
    assert found(folder / "one.safetensors", folder / "two.safetensors") == [("one", None, None), ("two", None, None)]


def test_checkpoint_whose_saving_was_cut_off_before_the_adapter_is_ignored(tmp_path):
    run = write_adapter(tmp_path / "run" / "checkpoint-5", epoch=1).parent
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-10" / "trainer_state.json").write_text("{")
    (run / "checkpoint-10" / "optimizer.pt").write_bytes(b"")
    assert found(run) == [("run", 5, 1)]


def bare(path: Path, *keys: str) -> Path:
    """A safetensors file without a configuration beside it; by default with the keys that kohya writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = keys or ("lora_unet_mid_attn.lora_down.weight", "lora_unet_mid_attn.lora_up.weight")
    save_file({key: np.ones((2, 2), np.float32) for key in keys}, path)
    return path


def test_names_of_kohya_tell_epoch_and_step(tmp_path):
    for name in ("style", "style-000004", "style-000010", "style-step00000500", "v1-5"):
        bare(tmp_path / "out" / f"{name}.safetensors")
    assert found(tmp_path / "out") == [
        ("style", 500, None),
        ("style", None, 4),
        ("style", None, 10),
        ("style", None, None),
        ("v1-5", None, None),
    ]
    assert found(tmp_path / "out" / "style-000004.safetensors") == [("style", None, 4)]
    assert {a.run for a in discover(tmp_path)} == {"out/style", "out/v1-5"}
    assert all(a.config == {} for a in discover(tmp_path))


def test_checkpoints_of_the_diffusers_scripts(tmp_path):
    run = tmp_path / "run"
    bare(run / "pytorch_lora_weights.safetensors", "unet.to_q.lora_A.weight", "unet.to_q.lora_B.weight")
    bare(run / "checkpoint-500" / "pytorch_lora_weights.safetensors", "unet.to_q.lora_A.weight")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (run / "checkpoint-500" / name).write_bytes(b"")
    assert found(run) == [("run", 500, None), ("run", None, None)]


@pytest.mark.parametrize("peft", ["adapter_model.safetensors", "adapter_model.bin", None])
@pytest.mark.parametrize("own", ["adapter_model.pt", "adapter_{}.pt"])
def test_epochs_of_torchtune(tmp_path, peft, own):
    for epoch in (0, 1, 10):
        folder = write_adapter(tmp_path / "run" / f"epoch_{epoch}")
        weights = folder / "adapter_model.safetensors"
        weights.rename(folder / peft) if peft else weights.unlink()
        (folder / own.format(epoch)).write_bytes(b"")
        (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    (tmp_path / "run" / "recipe_state").mkdir()
    (tmp_path / "run" / "recipe_state" / "recipe_state.pt").write_bytes(b"")
    adapters = discover(tmp_path)
    assert [(a.run, a.step, a.epoch) for a in adapters] == [("run", None, 0), ("run", None, 1), ("run", None, 10)]
    assert [a.file.name for a in adapters] == [peft or own.format(epoch) for epoch in (0, 1, 10)]
    assert all(a.config for a in adapters)


def test_old_torchtune_has_every_epoch_in_one_folder(tmp_path):
    folder = write_adapter(tmp_path / "run")
    for epoch in (0, 1):
        (folder / f"adapter_{epoch}.pt").write_bytes(b"")
    assert found(folder) == [("run", None, 0), ("run", None, 1), ("run", None, None)]


@pytest.mark.parametrize(
    ("name", "state", "expected"),
    [
        ("epoch_3", {}, (None, 3)),
        ("epoch-3", {}, (None, 3)),
        ("epoch-3", {"epoch": 3.0, "global_step": 90}, (90, 3)),
        ("step_500", {}, (500, None)),
        ("step-500", {"epoch": 1.5, "global_step": 500}, (500, 1.5)),
        ("checkpoint_500", {}, (500, None)),
        ("ckpt-30", {}, (30, None)),
        ("iter_5", {}, (5, None)),
        ("global_step40", {}, (40, None)),
        ("0001", {}, (1, None)),
        ("2024", {}, (None, None)),
        ("my-adapter", {"epoch": 2.0, "global_step": 60}, (60, 2)),
        ("my-adapter", {"epoch": 2.0}, (None, 2)),
        ("epoch", {}, (None, None)),
        ("epoch_3b", {}, (None, None)),
    ],
)
def test_step_and_epoch_are_of_the_folder_name_or_the_state(tmp_path, name, state, expected):
    folder = write_adapter(tmp_path / "run" / name)
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert [(a.step, a.epoch) for a in discover(tmp_path)] == [expected]


def test_state_in_the_root_of_a_run_belongs_to_its_last_checkpoint(tmp_path):
    run = write_adapter(tmp_path / "run", epoch=2)
    write_adapter(run / "checkpoint-10", epoch=1)
    assert found(run) == [("run", 10, 1), ("run", None, None)]
    assert found(run / "adapter_model.safetensors") == [("run", None, None)]


def test_adapters_side_by_side_and_in_folders_of_their_names(tmp_path):
    run = write_adapter(tmp_path / "run")
    write_adapter(run / "expert")
    (run / "copy.safetensors").write_bytes((run / "adapter_model.safetensors").read_bytes())
    assert found(run) == [("copy", None, None), ("expert", None, None), ("run", None, None)]
    assert all(a.config["r"] == 2 for a in discover(run))


def test_what_else_a_run_holds_is_neither_adapter_nor_error(tmp_path):
    folder = write_adapter(tmp_path / "run" / "checkpoint-5")
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "._adapter_model.safetensors"):
        (folder / name).write_bytes(b"not looked into")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "scheduler.pt", "x.ckpt", "pytorch_model.bin"):
        (folder / name).write_bytes(b"")
    bare(folder / "embeddings.safetensors", "model.embed_tokens.weight")
    assert found(tmp_path) == [("run", 5, None)]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth", ".ckpt"])
def test_a_file_that_is_given_is_taken_without_a_config(tmp_path, suffix):
    file = tmp_path / f"one{suffix}"
    file.write_bytes(b"")
    assert [(a.run, a.file, a.config) for a in discover(file)] == [("one", file, {})]


def test_broken_safetensors_in_a_searched_folder_is_named(tmp_path):
    bare(tmp_path / "style-000001.safetensors")
    (tmp_path / "style-000002.safetensors").write_bytes(b"cut off")
    assert error(tmp_path).startswith(f"{tmp_path}/style-000002.safetensors: not a complete safetensors file")


def test_two_adapters_of_one_run_and_step_are_told_apart(tmp_path):
    folder = write_adapter(tmp_path / "run" / "checkpoint-5")
    bare(folder / "pytorch_lora_weights.safetensors")
    names = [("run/checkpoint-5/adapter_model", 5, None), ("run/checkpoint-5/pytorch_lora_weights", 5, None)]
    assert found(tmp_path) == names


def test_full_checkpoints_are_found_if_asked_for(tmp_path):
    run = tmp_path / "run"
    for step, names in {
        10: ("model.safetensors", "pytorch_model.bin"),
        20: ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        30: ("pytorch_model.bin",),
    }.items():
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in (*names, "optimizer.pt", "training_args.bin"):
            (folder / name).write_bytes(b"")
        (folder / "trainer_state.json").write_text(json.dumps({"epoch": step / 10}))
    (write_adapter(run / "checkpoint-40", epoch=4) / "model.safetensors").write_bytes(b"")  # a merged copy
    expected = [("model.safetensors", 10, 1), ("model.safetensors.index.json", 20, 2), ("pytorch_model.bin", 30, 3)]
    expected.append(("adapter_model.safetensors", 40, 4))
    assert [(a.file.name, a.step, a.epoch) for a in discover(tmp_path, full=True)] == expected
    assert all((a.config == {}) == (a.step < 40) and a.run == "run" for a in discover(tmp_path, full=True))
    index = run / "checkpoint-20" / "model.safetensors.index.json"
    assert [(a.run, a.file, a.step) for a in discover(index, full=True)] == [("run", index, 20)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnalysisError, match=r"no adapter or full checkpoint found; looked in .* model\.safetensors"):
        discover(tmp_path / "empty", full=True)
    assert found(tmp_path) == [("run", 40, 4)]


def test_run_name_that_is_not_valid_text_becomes_valid(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        write_adapter(folder)
    except OSError:
        pytest.skip("the file system takes no such name")
    assert found(folder) == [("caf?", None, None)]


def error(*paths) -> str:
    with pytest.raises(AnalysisError) as caught:
        [(adapter.epoch, adapter.config) for adapter in discover(paths)]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_found_says_what_was_looked_for(tmp_path):
    write_adapter(tmp_path / "full" / "a")
    (tmp_path / "empty").mkdir()
    assert error(tmp_path / "full", tmp_path / "empty") == (
        f"{tmp_path}/empty: no adapter found; looked in it and all its folders for "
        "adapter_model.safetensors or adapter_model.bin beside adapter_config.json, and for files "
        "(.safetensors, .bin, .pt, .pth, .ckpt, .gguf, .lora) with the keys of an adapter; it is empty"
    )
    (tmp_path / "empty/weights.h5").write_bytes(b"")
    (tmp_path / "empty/more").mkdir()
    assert error(tmp_path / "empty").endswith("; it has weights.h5, more/")


def test_missing_path(tmp_path):
    assert error(tmp_path / "nowhere") == f"{tmp_path}/nowhere: no such file or folder"


def test_file_that_is_no_adapter(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert error(tmp_path / "notes.txt") == (
        f"{tmp_path}/notes.txt: not an adapter file; expected one of .safetensors, .bin, .pt, .pth, .ckpt, .gguf, .lora"
    )
    (tmp_path / "model.lora.h5").write_bytes(b"\x89HDF")
    assert "Keras" in error(tmp_path / "model.lora.h5")


@pytest.mark.parametrize("given", [".", "checkpoint-5", "checkpoint-5/adapter_model.safetensors"])
def test_missing_config_names_the_weights(tmp_path, given):
    folder = write_adapter(tmp_path / "checkpoint-5")
    (folder / "adapter_config.json").unlink()
    assert error(tmp_path / given) == (
        f"{folder}/adapter_model.safetensors: no adapter_config.json beside it; copy it there"
    )


def test_config_without_weights_is_named(tmp_path):
    folder = write_adapter(tmp_path / "run" / "checkpoint-5")
    (folder / "adapter_model.safetensors").unlink()
    expected = (
        f"{folder}/adapter_config.json: no weights of an adapter beside it; expected adapter_model.safetensors or "
        "adapter_model.bin; "
    )
    assert error(tmp_path) == expected + "the folder has no other file: copy the weights there"
    (folder / "weights.npz").write_bytes(b"")
    assert error(tmp_path) == expected + "beside it: weights.npz; copy the weights there, or rename them"
    (folder / "adapter_model.safetensors").symlink_to("../../blobs/0")
    lost = "adapter_model.safetensors is a link to a file that is not there: download it again"
    assert error(tmp_path) == expected + lost
    assert "a link to ../../blobs/0, which is not there" in error(folder / "adapter_model.safetensors")


def test_an_empty_path_is_a_variable_that_is_not_set():
    assert error("").startswith("an empty path is given")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth"])
def test_files_of_pytorch_are_found_in_folders_by_their_tensors(tmp_path, suffix):
    torch = pytest.importorskip("torch")
    torch.save({"layers.0.q.lora_A": torch.ones(2, 3), "layers.0.q.lora_B": torch.ones(3, 2)}, tmp_path / f"w{suffix}")
    torch.save({"layers.0.q.weight": torch.ones(2, 3)}, tmp_path / f"whole{suffix}")
    assert [adapter.file.name for adapter in discover(tmp_path)] == [f"w{suffix}"]
    (tmp_path / f"my_adapter{suffix}").write_bytes(b"no tensors")
    assert error(tmp_path).startswith(f"{tmp_path}/my_adapter{suffix}: ")


def test_two_files_of_one_adapter_that_differ(tmp_path):
    torch = pytest.importorskip("torch")
    folder = write_adapter(tmp_path / "a")
    tensors = {name: torch.from_numpy(value) for name, value in lora_tensors("layer.0.query").items()}
    torch.save(tensors, folder / "adapter_model.bin")
    assert found(folder) == [("a", None, None)]
    next(iter(tensors.values()))[0] += 1
    torch.save(tensors, folder / "adapter_model.bin")
    assert error(folder) == (
        f"{folder}/adapter_model.safetensors: adapter_model.bin beside it has other tensors; keep the one that is meant"
    )


def test_what_cannot_be_found_is_left_out_where_that_is_asked_for(tmp_path):
    for name in ("a", "b", "c"):
        write_adapter(tmp_path / name)
    (tmp_path / "a" / "adapter_config.json").unlink()
    (tmp_path / "b" / "adapter_config.json").write_text("{")
    failed: list[AnalysisError] = []
    assert [adapter.run for adapter in discover(tmp_path, failed=failed)] == ["c"]
    assert [str(one).partition(": ")[0] for one in failed] == [
        f"{tmp_path}/a/adapter_model.safetensors",
        f"{tmp_path}/b/adapter_config.json",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "it is a Git LFS pointer, not the file itself",
        ),
        (b"\n<!DOCTYPE html><html>", "it is an HTML page, not the file itself; download the file again"),
        (b"PK\3\4" + bytes(100), "it was saved by torch.save, not as safetensors; rename it to end in .bin"),
    ],
)
def test_what_stands_in_place_of_tensors_is_named(tmp_path, content, expected):
    file = write_adapter(tmp_path / "a") / "adapter_model.safetensors"
    file.write_bytes(content)
    with pytest.raises(AnalysisError) as caught:
        open_tensors(file)
    assert str(caught.value).startswith(f"{file}: {expected}")


@pytest.mark.parametrize("text", ["{", "", '{"a": \x00}', "\xff", "[" * 100_000])
@pytest.mark.parametrize("name", ["adapter_config.json", "trainer_state.json"])
def test_json_that_cannot_be_parsed_names_the_file(tmp_path, name, text):
    folder = write_adapter(tmp_path / "run" / "checkpoint-5", epoch=1)
    (folder / name).write_text(text, encoding="latin-1")
    what = "more than 50 levels" if len(text) > 100 else "not valid JSON: "
    assert error(tmp_path).startswith(f"{folder / name}: {what}")


def test_json_of_another_kind(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text("[1]")
    assert error(folder) == f"{folder}/adapter_config.json: expected a JSON object, got list"


@pytest.mark.parametrize("epoch", ["'one'", True, float("nan"), float("inf"), [1], 2**63, 1e300])
def test_epoch_that_is_no_number(tmp_path, epoch):
    folder = write_adapter(tmp_path / "run" / "checkpoint-5")
    (folder / "trainer_state.json").write_text(json.dumps({"epoch": epoch}))
    assert error(folder).startswith(f"{folder}/trainer_state.json: epoch must be a number")


def test_natural_order():
    names = ["a.10", "a.9", "b", "a.9.x2", "a.9.x10", "10", "9", "1" * 5000]
    assert sorted(names, key=natural_key)[:4] == ["9", "10", "1" * 5000, "a.9"]


def test_folders_that_may_not_be_listed_are_errors_by_name(tmp_path):
    write_adapter(tmp_path / "good")
    write_adapter(tmp_path / "secret" / "bad")
    (tmp_path / "secret").chmod(0)
    with suppress(PermissionError):
        os.listdir(tmp_path / "secret")
        pytest.skip("this user may list every folder")
    expected = f"{tmp_path}/secret: cannot be listed: Permission denied; make it readable, or give other paths"
    try:
        assert error(tmp_path) == expected
        failed: list[AnalysisError] = []
        assert [adapter.run for adapter in discover(tmp_path, failed=failed)] == ["good"]
        assert [str(one) for one in failed] == [expected]
    finally:
        (tmp_path / "secret").chmod(0o700)


def test_finding_reads_nothing_where_names_tell_all(tmp_path):
    folder = write_adapter(tmp_path / "run" / "checkpoint-5")
    for name in ("adapter_config.json", "trainer_state.json"):
        (folder / name).write_text("not read")
    (adapter,) = discover(tmp_path)
    assert (adapter.run, adapter.step) == ("run", 5)
    failed: list[AnalysisError] = []
    assert discover(tmp_path, failed=failed) == []
    assert [str(one).partition(": ")[0] for one in failed] == [str(folder / "trainer_state.json")]
