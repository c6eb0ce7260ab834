"""``msplora-measure moments`` on runs of toys: what it finds, what it writes, what it refuses; several processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from msplora_core import record_moments
from msplora_core.errors import TrainingError
from msplora_core.measure.cli import app
from msplora_core.measure.loading import find_adapter, load_subject
from msplora_core.moments import read_moments
from msplora_core.run.settings import Settings
from msplora_core.train.training import train

from .test_distributed import on_two_processes, told
from .toys import toy_settings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = toy_settings(tmp_path_factory.mktemp("run"), epochs=2)
    train(settings, report=lambda line: None)
    return settings


def measured(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["moments", *map(str, arguments)])


def test_a_run_is_measured_at_its_last_checkpoint(run: Settings) -> None:
    result = measured(run.output_dir)
    assert result.exit_code == 0, result.output
    newest = find_adapter(run.output_dir).adapter
    assert newest.name == "checkpoint-6"
    found = read_moments(newest / "moments.safetensors")
    assert str(newest / "moments.safetensors") in result.output
    about = found.about
    assert (about["model"], about["task"], about["loss"]) == (run.model, "cola", "classification")
    assert (about["examples"], about["labels"]) == (21, "sampled")
    assert about["data"]["sha256"] == json.loads((run.output_dir / "run.json").read_text())["data"]["train"]["sha256"]
    for module in found.modules.values():
        assert len(module.scores["plain"]) == about["examples"] * about["draws"]


def test_the_head_is_the_trained_one_and_examples_are_the_first_of_the_file(run: Settings, tmp_path: Path) -> None:
    subject = load_subject(run.output_dir)
    rows = subject.splits["train"].rows
    (batch,) = subject.batches("train", examples=5)
    assert [subject.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]] == [
        row["sentence"] for row in rows[:5]
    ]
    head = {name: p for name, p in subject.model.named_parameters() if "classifier.modules_to_save" in name}
    other = load_subject(run.output_dir / "checkpoint-0").model.state_dict()
    assert head
    assert any(not torch.equal(p, other[name]) for name, p in head.items())
    expected = record_moments(subject.model, [batch])
    result = measured(run.output_dir, "--examples", 5, "--batch-size", 2, "--out", tmp_path / "five.safetensors")
    assert result.exit_code == 0, result.output
    found = read_moments(tmp_path / "five.safetensors")
    for name, module in expected.modules.items():
        np.testing.assert_allclose(found.modules[name].s_b, module.s_b, rtol=1e-3, atol=1e-12)


def test_checkpoints_are_measured_one_after_another(run: Settings, tmp_path: Path) -> None:
    copy = shutil.copytree(run.output_dir, tmp_path / "run")
    folders = [copy / f"checkpoint-{step}" for step in (0, 3)]
    result = measured(*folders, "--examples", 5)
    assert result.exit_code == 0, result.output
    untrained, trained = (read_moments(folder / "moments.safetensors") for folder in folders)
    assert all(not module.s_b.any() for module in untrained.modules.values())  # B is zero
    alone = measured(folders[1], "--examples", 5, "--out", tmp_path / "alone.safetensors")
    assert alone.exit_code == 0, alone.output
    for name, module in read_moments(tmp_path / "alone.safetensors").modules.items():
        np.testing.assert_array_equal(trained.modules[name].s_b, module.s_b)


def test_an_adapter_without_a_run_needs_model_and_task(run: Settings, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(find_adapter(run.output_dir).adapter, adapter)
    with pytest.raises(TrainingError, match=r"adapter: .*'model'"):
        load_subject(adapter)
    given = ["--model", run.model, "--task", "cola", "--data-dir", run.data_dir]
    result = measured(adapter, *given, "--labels", "given", "--cores")
    assert result.exit_code == 0, result.output
    found = read_moments(adapter / "moments.safetensors")
    assert found.about["labels"] == "given"
    assert all(module.cores is not None for module in found.modules.values())


def test_instruction_tuning_counts_responses_alone(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path, "llama", task="alpaca", epochs=1, method="lora", rank=2)
    train(settings, report=lambda line: None)
    result = measured(settings.output_dir, "--draws", 2)
    assert result.exit_code == 0, result.output
    found = read_moments(find_adapter(settings.output_dir).adapter / "moments.safetensors")
    assert (found.about["loss"], found.about["draws"]) == ("causal", 2)


def test_bad_input_is_one_line(run: Settings, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    shutil.copytree(run.output_dir / "checkpoint-0", headless)
    _drop_head(headless / "adapter_model.safetensors")
    given = ["--model", run.model, "--task", "cola", "--data-dir", run.data_dir]
    for arguments, words in (
        ([tmp_path / "nothing"], "nothing"),
        ([tmp_path], "adapter_config.json"),
        ([headless, *given], "classifier"),
        ([run.output_dir, "--labels", "maximal"], "labels"),
        ([run.output_dir, "--data-dir", tmp_path], "cola_train.jsonl"),
        ([run.output_dir, "--task", "stsb", "--data-dir", run.data_dir], "stsb_train.jsonl"),
        ([run.output_dir, "--out", tmp_path], "out"),
        ([run.output_dir, run.output_dir, "--out", tmp_path / "one"], "2 adapters"),
    ):
        result = measured(*arguments)
        assert isinstance(result.exception, TrainingError), (arguments, result.output)
        assert words in str(result.exception)
        assert "\n" not in str(result.exception)
    assert not list(tmp_path.rglob("moments.safetensors"))


def _drop_head(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: value for name, value in load_file(path).items() if "classifier" not in name}, path)


@pytest.mark.slow
@pytest.mark.parametrize("examples", [21, 1])
def test_two_processes_measure_as_one(run: Settings, tmp_path: Path, examples: int) -> None:
    arguments = [run.output_dir, "--batch-size", 4, "--examples", examples, "--draws", 2, "--cores"]
    one = measured(*arguments, "--out", tmp_path / "one.safetensors")
    assert one.exit_code == 0, one.output

    def work() -> None:
        result = measured(*arguments, "--out", tmp_path / "two.safetensors")
        print(result.output)
        assert result.exit_code == 0

    assert on_two_processes(work, tmp_path) == [0, 0], told(tmp_path, 0) + told(tmp_path, 1)
    assert "modules" in told(tmp_path, 0)
    assert "modules" not in told(tmp_path, 1)  # one process talks
    one_file, two_files = (read_moments(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one_file.about == two_files.about
    for name, module in one_file.modules.items():
        other = two_files.modules[name]
        np.testing.assert_allclose(other.s_a, module.s_a, rtol=1e-5)
        np.testing.assert_allclose(other.s_b, module.s_b, rtol=1e-4, atol=1e-14)
        largest = float(np.abs(module.cores).max())
        np.testing.assert_allclose(other.cores, module.cores, rtol=1e-3, atol=1e-4 * largest)
