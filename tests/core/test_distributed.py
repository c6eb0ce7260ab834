"""Two processes on the CPU (gloo) against one: the same losses and adapter, one writer, shared parameters reduced once.

The processes are forks of the test's own, with the environment that torchrun gives; one test runs torchrun itself.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from msplora_core import MSPLoraConfig, cli
from msplora_core.errors import TrainingError
from msplora_core.run import console, distributed, lock, record
from msplora_core.run.settings import Settings
from msplora_core.train.trainer import AdapterTrainer
from msplora_core.train.training import train

from .conftest import make_llama
from .kill_loop import fork
from .toys import toy_settings

# Sums over a batch are taken in another order; Adam amplifies what is left of it where gradients almost vanish.
LOSS = {"rel": 1e-5}
WEIGHT = {"rtol": 1e-3, "atol": 1e-4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # masks differ between processes


def on_two_processes(work: Callable[[], Any], folder: Path) -> list[int]:
    """Do ``work`` in two forks that know of each other; returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def process(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)  # the tests before had one process
        work()

    children = [fork(lambda rank=rank: process(rank), folder / f"process-{rank}.log") for rank in (0, 1)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def told(folder: Path, rank: int) -> str:
    log, error = folder / f"process-{rank}.log", folder / f"process-{rank}.error"
    return log.read_text() + (error.read_text() if error.exists() else "")


def assert_same(two: Settings, one: Settings) -> None:
    results = [record.read(settings.output_dir)["results"] for settings in (two, one)]
    assert [result["step"] for result in results[0]] == [result["step"] for result in results[1]]
    for ours, theirs in zip(*results, strict=True):
        for name in ("train_loss", "validation_loss", "metric"):
            assert ours[name] == (None if theirs[name] is None else pytest.approx(theirs[name], **LOSS))
    for result in results[1]:
        name = f"checkpoint-{result['step']}/adapter_model.safetensors"
        ours, theirs = (load_file(settings.output_dir / name) for settings in (two, one))
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], **WEIGHT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "task", "options"),
    [
        ("bert", "cola", {"micro_batch_size": 2}),
        ("llama", "alpaca", {}),
        ("llama", "cola", {"shard_base": True, "gradient_checkpointing": True}),
    ],
)
def test_two_processes_train_as_one(kind: str, task: str, options: dict[str, Any], tmp_path: Path) -> None:
    # 21 and 19 examples: the last batch of 8 has 5 and 3, which two processes share 4 + 1 and 3 + 0
    one = toy_settings(tmp_path, kind, NO_DROPOUT, task=task, epochs=2, lora_dropout=0.0, rank=8)
    train(one, report=lambda line: None)
    two = replace(one, output_dir=tmp_path / "two", **options)
    assert on_two_processes(lambda: train(two, report=print), tmp_path) == [0, 0], told(tmp_path, 0)
    assert_same(two, one)
    assert "epoch 2/2" in told(tmp_path, 0)
    assert "epoch" not in told(tmp_path, 1)  # one process talks
    assert record.read(two.output_dir)["processes"] == 2


@pytest.mark.slow
def test_two_processes_resume_within_an_epoch(tmp_path: Path) -> None:
    one = toy_settings(tmp_path, "bert", NO_DROPOUT, epochs=3, lora_dropout=0.0)
    train(one, report=lambda line: None)
    two = replace(one, output_dir=tmp_path / "two", save_steps=1)

    def stop_after_step_5() -> None:
        save = AdapterTrainer._save_checkpoint

        def die(self: AdapterTrainer, *args: Any) -> None:
            save(self, *args)
            if self.state.global_step == 5:  # of 3 steps an epoch
                os._exit(7)

        AdapterTrainer._save_checkpoint = die  # type: ignore[method-assign]
        train(two, report=print)

    assert on_two_processes(stop_after_step_5, tmp_path) == [7, 7], told(tmp_path, 0)
    resumed = replace(two, resume=True)
    assert on_two_processes(lambda: train(resumed, report=print), tmp_path) == [0, 0], told(tmp_path, 0)
    assert "checkpoint-5" in told(tmp_path, 0)
    assert_same(two, one)
    assert sorted(path.name for path in two.output_dir.iterdir()) == [
        "checkpoint-0", "checkpoint-3", "checkpoint-6", "checkpoint-9", "run.json",
    ]  # fmt: skip


@pytest.mark.parametrize(("sharded", "checkpointing"), [(False, True), (True, False)])
def test_shared_parameters_are_reduced_once_and_the_base_is_halved(
    sharded: bool, checkpointing: bool, tmp_path: Path
) -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        base = make_llama(layers=6)
        model: Any = peft.get_peft_model(base, MSPLoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    tokens = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0))

    def work() -> None:
        distributed.join()
        model = adapted()
        whole = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        if sharded:
            distributed.shard_frozen(model)
        wrapped: Any = distributed.replicate_trained(model)
        reduced: list[int] = []

        def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            reduced.append(bucket.buffer().numel())
            return allreduce_hook(None, bucket)

        count.__annotations__ = allreduce_hook.__annotations__  # which DistributedDataParallel checks, not as text
        wrapped.register_comm_hook(None, count)
        half = tokens[2 * dist.get_rank() :][:2]
        wrapped(input_ids=half, labels=half).loss.backward()
        frozen = [p for p in model.parameters() if not p.requires_grad]
        seen = {
            "reduced": sum(reduced),
            "whole": whole,
            "held": sum((p.to_local() if sharded else p).numel() for p in frozen),
        }
        (tmp_path / f"seen-{dist.get_rank()}.json").write_text(json.dumps(seen))
        if dist.get_rank() == 0:
            torch.save({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, tmp_path / "gradients.pt")

    assert on_two_processes(work, tmp_path) == [0, 0], told(tmp_path, 0) + told(tmp_path, 1)
    model = adapted()
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}  # each parameter once
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"seen-{rank}.json").read_text())
        assert seen["reduced"] == sum(p.numel() for p in trained.values())
        assert seen["held"] == (pytest.approx(seen["whole"] / 2, rel=0.02) if sharded else seen["whole"])
    gradients = torch.load(tmp_path / "gradients.pt")
    assert gradients.keys() == trained.keys()
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, parameter in trained.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_an_error_of_all_processes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = toy_settings(tmp_path)
    monkeypatch.setattr(console, "_PATIENCE", 60.0)
    arguments = ["--model", settings.model, "--data-dir", str(settings.data_dir), "--output-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["msplora-train", *arguments, "--task", "cola", "--batch-size", "7"])
    monkeypatch.setattr(console.time, "sleep", lambda seconds: os._exit(3))  # as if the launcher ended it

    def work() -> None:
        try:
            cli.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    assert on_two_processes(work, tmp_path) == [1, 3]
    lines = [line for line in (told(tmp_path, 0) + told(tmp_path, 1)).splitlines() if "error" in line]
    assert lines == [
        "error: --batch-size=7: it is that of all 2 processes together, so expected a multiple of 2 (processes x "
        "--micro-batch-size); change --batch-size or --micro-batch-size"
    ]
    assert not (tmp_path / "run").exists()


def test_a_failure_in_any_process_is_told_in_all(tmp_path: Path) -> None:
    def work() -> None:
        distributed.join()
        with pytest.raises(TrainingError, match="disk of process 1"):
            distributed.raise_first("disk of process 1" if dist.get_rank() == 1 else None)
        assert distributed.by_writer(lambda: dist.get_rank() + 5) == 5

        def refuse() -> None:
            raise TrainingError("refused")

        with pytest.raises(TrainingError, match="refused"):
            distributed.by_writer(refuse)

    assert on_two_processes(work, tmp_path) == [0, 0], told(tmp_path, 0) + told(tmp_path, 1)


def test_annealing_is_refused(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path, method="lora", anneal=[4, 2])

    def work() -> None:
        with pytest.raises(TrainingError, match="works in one process"):
            train(settings)

    assert on_two_processes(work, tmp_path) == [0, 0], told(tmp_path, 0) + told(tmp_path, 1)
    assert not settings.output_dir.exists()


def test_sharding_needs_several_processes() -> None:
    with pytest.raises(TrainingError, match="start several with torchrun"):
        distributed.shard_frozen(make_llama(layers=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--num-processes", "2", "--multi-gpu"],  # so it is called without GPUs too,
    ],
)
def test_launchers(launcher: list[str], tmp_path: Path) -> None:
    settings = toy_settings(tmp_path)
    options = ["--model", settings.model, "--data-dir", str(settings.data_dir), "--task", "cola", "--epochs", "1"]
    options += ["--batch-size", "8"]
    run = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "msplora_core.cli", *options, "--output-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("epoch 1/1") == 1
    assert run.stdout.count("Best matthews_correlation") == 1
    assert [result["step"] for result in record.read(tmp_path / "run")["results"]] == [0, 3]
    assert record.read(tmp_path / "run")["processes"] == 2


@pytest.mark.slow
def test_torchrun_into_the_folder_of_another_training_is_refused_once(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path)
    options = ["--model", settings.model, "--data-dir", str(settings.data_dir), "--task", "cola", "--epochs", "1"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "msplora_core.cli"]
    folder = tmp_path / "run"
    folder.mkdir()
    with lock.held(folder):
        run = subprocess.run(
            [sys.executable, "-m", *launcher, *options, "--output-dir", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode != 0
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert str(folder) in line
    assert f"process {os.getpid()} on" in line
    assert list(folder.iterdir()) == []
