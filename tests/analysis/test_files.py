import json
import os
from pathlib import Path

import pytest
from adapters import write_adapter

from msplora_analysis import AnalysisError
from msplora_analysis.files import discover, natural_key


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


def test_run_name_that_is_not_valid_text_becomes_valid(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        write_adapter(folder)
    except OSError:
        pytest.skip("the file system takes no such name")
    assert found(folder) == [("caf?", None, None)]


def error(*paths) -> str:
    with pytest.raises(AnalysisError) as caught:
        discover(paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_found_says_what_was_looked_for(tmp_path):
    write_adapter(tmp_path / "full" / "a")
    (tmp_path / "empty").mkdir()
    assert error(tmp_path / "full", tmp_path / "empty") == (
        f"{tmp_path}/empty: no adapter found; looked in it and all its folders for "
        "adapter_model.safetensors or adapter_model.bin beside adapter_config.json"
    )


def test_missing_path(tmp_path):
    assert error(tmp_path / "nowhere") == f"{tmp_path}/nowhere: no such file or folder"


def test_file_that_is_no_adapter(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert error(tmp_path / "notes.txt") == (
        f"{tmp_path}/notes.txt: not an adapter file; expected one of .safetensors, .bin, .pt"
    )


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
    assert error(tmp_path) == (
        f"{folder}/adapter_config.json: no weights beside it; expected adapter_model.safetensors or "
        "adapter_model.bin; remove the folder if its saving was cut off"
    )


@pytest.mark.parametrize("text", ["{", "", '{"a": \x00}', "\xff", "[" * 100_000])
@pytest.mark.parametrize("name", ["adapter_config.json", "trainer_state.json"])
def test_json_that_cannot_be_parsed_names_the_file(tmp_path, name, text):
    folder = write_adapter(tmp_path / "run" / "checkpoint-5", epoch=1)
    (folder / name).write_text(text, encoding="latin-1")
    assert error(tmp_path).startswith(f"{folder / name}: not valid JSON: ")


def test_json_of_another_kind(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text("[1]")
    assert error(folder) == f"{folder}/adapter_config.json: expected a JSON object, got list"


@pytest.mark.parametrize("epoch", ["'one'", True, float("nan"), float("inf"), [1]])
def test_epoch_that_is_no_number(tmp_path, epoch):
    folder = write_adapter(tmp_path / "run" / "checkpoint-5")
    (folder / "trainer_state.json").write_text(json.dumps({"epoch": epoch}))
    assert error(folder) == f"{folder}/trainer_state.json: epoch must be a number, got {epoch!r}"


def test_natural_order():
    names = ["a.10", "a.9", "b", "a.9.x2", "a.9.x10", "10", "9", "1" * 5000]
    assert sorted(names, key=natural_key)[:4] == ["9", "10", "1" * 5000, "a.9"]
