"""Two trainings never write to one folder: the second names the first; what a killed one leaves locks nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from msplora_core.errors import TrainingError
from msplora_core.names import LOCK
from msplora_core.run import lock
from msplora_core.run.settings import Settings
from msplora_core.train.training import train

from .kill_loop import differences, fork
from .toys import toy_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return toy_settings(tmp_path)


def holding(folder: Path, log: Path) -> int:
    """Another process that holds a folder until it is killed; its id."""

    def work() -> None:
        with lock.held(folder):
            (folder / "held").touch()
            time.sleep(1000)

    folder.mkdir(exist_ok=True)
    child = fork(work, log)
    while not (folder / "held").exists():
        time.sleep(0.01)
    (folder / "held").unlink()
    return child


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}], ids=["new", "overwrite", "resume"])
def test_a_second_training_names_the_first_and_a_dead_one_is_none(
    settings: Settings, tmp_path: Path, options: dict[str, bool]
) -> None:
    other = holding(settings.output_dir, tmp_path / "log")
    with pytest.raises(TrainingError, match=rf"process {other} on .*, since 20.*'output_dir'") as caught:
        train(replace(settings, **options), report=print)
    assert "\n" not in str(caught.value)
    assert [path.name for path in settings.output_dir.iterdir()] == [LOCK]
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert (settings.output_dir / LOCK).exists()  # left behind, and in nobody's way
    train(replace(settings, **options), report=print)
    assert not (settings.output_dir / LOCK).exists()


def test_a_training_that_begins_while_another_loads_its_model(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find the folder empty; only one may go on."""
    from msplora_core.train import training

    load = training.load_model

    def meanwhile(*args: object) -> object:
        monkeypatch.setattr(training, "load_model", load)
        train(settings, report=print)
        return load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "load_model", meanwhile)
    with pytest.raises(TrainingError, match="another training wrote to it just now"):
        train(settings, report=print)
    assert differences(settings.output_dir, settings.output_dir) == []


def test_the_folder_is_free_after_an_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **others: object) -> None:
        raise TrainingError("no")

    monkeypatch.setattr("msplora_core.train.training.AdapterTrainer.train", fail)
    with pytest.raises(TrainingError, match="no"):
        train(settings, report=print)
    assert [path.name for path in settings.output_dir.iterdir()] == ["run.json"]


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def none(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock, "_lock", none)
    with lock.held(tmp_path) as note:
        assert note is not None
        assert "has no locks" in note


def test_many_at_once_one_after_another(tmp_path: Path) -> None:
    """The file is removed while others wait for it: no two may hold it."""
    inside = tmp_path / "inside"

    def work() -> None:
        for _ in range(100):
            try:
                with lock.held(tmp_path):
                    inside.touch(exist_ok=False)  # fails if another is there
                    inside.unlink()
            except TrainingError:  # waited for long
                continue

    children = [fork(work, tmp_path / f"{i}.log") for i in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


@pytest.mark.slow
def test_the_command_beside_a_living_one(settings: Settings, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from msplora_core.cli import main; main()", "--task", "cola", "--batch-size", "8"]
    command += [
        "--model",
        settings.model,
        "--data-dir",
        str(settings.data_dir),
        "--output-dir",
        str(settings.output_dir),
    ]
    first = subprocess.Popen([*command, "--epochs", "2000"], stderr=subprocess.PIPE, text=True)
    try:
        while not (settings.output_dir / "checkpoint-3").exists():
            assert first.poll() is None
            time.sleep(0.05)
        for options in ((), ("--resume",), ("--overwrite",)):
            second = subprocess.run(
                [*command, "--epochs", "2000", *options], capture_output=True, text=True, timeout=300
            )
            assert second.returncode == 1
            assert second.stderr.count("\n") == 1
            assert f"process {first.pid} on " in second.stderr
            assert "--output-dir" in second.stderr
    finally:
        first.terminate()
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 143, stderr
    assert not [path for path in settings.output_dir.iterdir() if path.name.startswith(".")]
