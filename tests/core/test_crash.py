"""Runs that are killed, stopped, or out of disk: what they leave is whole, and resuming gives the unbroken result."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from msplora_core.errors import TrainingError
from msplora_core.methods.msplora import MSPLora
from msplora_core.names import PARTIAL
from msplora_core.run import checkpoints, record
from msplora_core.run.settings import Settings
from msplora_core.train.trainer import AdapterTrainer
from msplora_core.train.training import train

from .kill_loop import differences, fork, loop
from .toys import toy_settings


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A finished toy run; tests copy it."""
    settings = toy_settings(tmp_path_factory.mktemp("unbroken"))
    train(settings, report=lambda line: None)
    return settings


@pytest.fixture
def finished(unbroken: Settings, tmp_path: Path) -> Settings:
    """A copy of the finished run, to be resumed."""
    settings = replace(unbroken, output_dir=tmp_path / "run", resume=True)
    shutil.copytree(unbroken.output_dir, settings.output_dir)
    return settings


def resume(settings: Settings) -> list[str]:
    lines: list[str] = []
    train(settings, report=lines.append)
    return lines


def forget_the_end(settings: Settings) -> None:
    """As if the run had been killed before its last record."""
    run = record.read(settings.output_dir)
    del run["results"]
    record.write(settings.output_dir, run)


# --- Kills ---


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [None, 2])
def test_killed_again_and_again(tmp_path: Path, save_steps: int | None) -> None:
    evidence = loop(toy_settings(tmp_path, save_steps=save_steps), tmp_path, kills=3, seed=3)
    assert evidence.kills.total() >= 3
    assert evidence.different == []


def test_save_steps_change_nothing_and_resume_in_the_middle_of_an_epoch(unbroken: Settings, tmp_path: Path) -> None:
    settings = replace(unbroken, output_dir=tmp_path / "run", save_steps=1)

    class Killed(BaseException):
        pass

    def die(self: AdapterTrainer, *args: Any) -> None:
        save(self, *args)
        if self.state.global_step == 5:  # of 3 steps an epoch
            raise Killed

    save = AdapterTrainer._save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "_save_checkpoint", die)
        with pytest.raises(Killed):
            train(settings, report=lambda line: None)
    assert [*checkpoints.all_in(settings.output_dir)] == [5, 4, 3, 0]  # killed before the older one was dropped
    lines = resume(replace(settings, resume=True))
    assert any(line.endswith("checkpoint-5") for line in lines)
    assert differences(settings.output_dir, unbroken.output_dir) == []


# --- What is found when resuming ---


def test_a_finished_run_is_left_alone(finished: Settings) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.output_dir.rglob("*")}
    assert resume(finished) == [f"{finished.output_dir}: the run is finished; nothing is left to do"]
    assert {path: path.stat().st_mtime_ns for path in finished.output_dir.rglob("*")} == before


def test_killed_between_the_last_checkpoint_and_the_record(finished: Settings, unbroken: Settings) -> None:
    forget_the_end(finished)
    resume(finished)
    assert differences(finished.output_dir, unbroken.output_dir) == []


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_half_copied_checkpoint_is_named_and_passed_over(
    finished: Settings, unbroken: Settings, name: str, damage: str
) -> None:
    file = finished.output_dir / "checkpoint-9" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    newest, notes = checkpoints.newest_whole(finished.output_dir)
    assert newest is None  # earlier epochs have the adapter alone
    assert len(notes) == 1
    assert "checkpoint-9 is not whole" in notes[0]
    assert name in notes[0]
    assert record.results_if_finished(finished) is None


def test_starting_again_where_no_checkpoint_is_whole(finished: Settings, unbroken: Settings) -> None:
    (finished.output_dir / "checkpoint-9" / "optimizer.pt").write_bytes(b"")
    (finished.output_dir / PARTIAL / "checkpoint-12").mkdir(parents=True)
    lines = resume(finished)
    assert any(
        "checkpoint-9 is not whole (optimizer.pt is damaged or cut off: File is not a zip" in line for line in lines
    )
    assert any("removed checkpoint-12, which a killed run had not finished" in line for line in lines)
    assert "resuming from the beginning: there is no whole checkpoint" in lines
    assert differences(finished.output_dir, unbroken.output_dir) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 4}, r"other settings \(epochs 3 -> 4\)"),
        ({"seed": 1, "method": MSPLora(rank=4)}, r"other settings \(seed 0 -> 1; rank 8 -> 4\)"),
    ],
)
def test_changed_arguments_are_refused_by_name(finished: Settings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        train(replace(finished, **change), report=lambda line: None)


def test_changed_data_and_weights_are_refused(finished: Settings, tmp_path: Path) -> None:
    forget_the_end(finished)
    run = record.read(finished.output_dir)
    run["data"]["train"]["sha256"] = "other"
    run["model"]["weights_sha256"] = {"model.safetensors": "other"}
    record.write(finished.output_dir, run)
    with pytest.raises(
        TrainingError, match=r"the train data \(.*jsonl\) and the weights of the model .* changed since"
    ):
        resume(finished)
    assert (finished.output_dir / "checkpoint-9" / "optimizer.pt").exists()


def test_other_versions_are_told(finished: Settings) -> None:
    forget_the_end(finished)
    run = record.read(finished.output_dir)
    run["versions"]["torch"] = "2.0"
    record.write(finished.output_dir, run)
    assert any(f"(torch 2.0 -> {torch.__version__})" in line for line in resume(finished))


def test_checkpoints_without_a_record_are_refused(finished: Settings) -> None:
    (finished.output_dir / "run.json").unlink()
    with pytest.raises(TrainingError, match=r"run.json: is missing, .*checkpoint-9.*overwrite=True"):
        resume(finished)


# --- A full disk ---


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_rust(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def no_space_in_torch(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/7")


@pytest.mark.parametrize(
    ("target", "failure"),
    [
        ("peft.peft_model.safe_save_file", no_space_in_rust),
        ("torch.save", no_space_in_torch),
        ("transformers.trainer_callback.TrainerState.save_to_json", no_space),
        ("os.fsync", no_space),
    ],
)
def test_a_full_disk_ends_in_one_line(
    unbroken: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, failure: Callable[..., None]
) -> None:
    settings = replace(unbroken, output_dir=tmp_path / "run")

    def fill(line: str) -> None:
        if line.startswith("epoch 2"):  # evaluated, not yet saved
            monkeypatch.setattr(target, failure)

    with pytest.raises(TrainingError, match=r"cannot be written \(.*resume=True") as caught:
        train(settings, report=fill)
    monkeypatch.undo()
    assert str(settings.output_dir) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in settings.output_dir.iterdir()) == ["checkpoint-0", "checkpoint-3", "run.json"]
    resume(replace(settings, resume=True))
    assert differences(settings.output_dir, unbroken.output_dir) == []


@pytest.mark.parametrize("small_disk", ["2m"], indirect=True)
def test_a_really_full_disk(unbroken: Settings, small_disk: Path) -> None:
    settings = replace(unbroken, output_dir=small_disk / "run")
    filler = small_disk / "filler"
    with pytest.raises(TrainingError, match=r"cannot be written \(.*[Nn]o space left on.*resume=True"):
        train(settings, report=lambda line: fill_up(filler) if line.startswith("epoch 2") else None)
    assert not (settings.output_dir / PARTIAL).exists()
    filler.unlink()
    lines = resume(replace(settings, resume=True))
    assert any(line.endswith("checkpoint-3") for line in lines)
    assert differences(settings.output_dir, unbroken.output_dir) == []


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - 8192)


# --- Signals ---


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(unbroken: Settings, tmp_path: Path, number: signal.Signals, status: int) -> None:
    output_dir = tmp_path / "run"
    options = {"--model": unbroken.model, "--data-dir": unbroken.data_dir, "--output-dir": output_dir}
    arguments = [str(part) for option in options.items() for part in option]

    def work() -> None:
        from msplora_core import cli

        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["msplora-train", *arguments, "--task", "cola", "--epochs", "500", "--batch-size", "8"]
        try:
            cli.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    child = fork(work, tmp_path / "log")
    while not (output_dir / "checkpoint-3").exists():
        time.sleep(0.01)
    os.kill(child, number)
    _, ended = os.waitpid(child, 0)
    assert os.WEXITSTATUS(ended) == status
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if "stopped" in line] == [
        f"stopped: what {output_dir} has is whole; continue with the same command and --resume"
    ]
    assert "Traceback" not in "".join(lines)
    assert not [path.name for path in output_dir.iterdir() if path.name.startswith(".")]
    newest, notes = checkpoints.newest_whole(output_dir)
    assert newest is not None
    assert notes == []
    assert json.loads((output_dir / "run.json").read_text())["settings"]["epochs"] == 500
