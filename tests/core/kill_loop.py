"""Kill a training run again and again, and see that nothing half-written is ever left and nothing is lost.

Evidence by command, not part of the suite (tests/core/test_crash.py does a few kills): ::

    python -m tests.core.kill_loop --kills 50                 # a toy BERT
    python -m tests.core.kill_loop --kills 50 --model minilm  # the embedded model on generated sentences

Every attempt is a fork of this process, which has imported everything, so that fifty cost minutes. An
attempt is killed (SIGKILL) after a random time, or before its n-th call that opens, renames or removes a
file in the run folder, n random; then every checkpoint is read, and the run is resumed. A run that has come
to its end is compared with an unbroken one: adapters of all epochs, optimiser, losses and results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import msplora_analysis as ma
from msplora_analysis.adapters.discovery import discover
from msplora_core.data.acceptability import generate
from msplora_core.names import PARTIAL
from msplora_core.run import checkpoints
from msplora_core.run.settings import Settings, make_settings
from msplora_core.train.training import train

_TOUCHING = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
_RUNTIME = ("runtime", "per_second")


def fork(work: Callable[[], None], output: Path) -> int:
    """Do ``work`` in a fork, its output written to a file; returns the fork's process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with output.open("a", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            work()
        status = 0
    except BaseException as error:
        output.with_suffix(".error").write_text(repr(error))
    finally:
        os._exit(status)


def kill_before(call: int, folder: Path) -> None:
    """Make this process die before its ``call``-th call that touches a file in ``folder``."""
    left = [call]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _TOUCHING and arguments and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def attempt(settings: Settings, log: Path, *, seconds: float | None = None, call: int | None = None) -> bool:
    """Resume a run in a fork and kill it; returns whether it was killed before it ended.

    Raises:
        AssertionError: it ended in an error.
    """

    def work() -> None:
        if call is not None:
            kill_before(call, settings.output_dir)
        train(replace(settings, resume=True), report=print)

    child = fork(work, log)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, log.with_suffix(".error").read_text()
    return False


def check_whole(output_dir: Path) -> int:
    """Read every checkpoint, as PEFT's files and with msplora_analysis; returns their number.

    Raises:
        AssertionError: one is not whole.
    """
    found = checkpoints.all_in(output_dir)
    for step, folder in found.items():
        assert load_file(folder / "adapter_model.safetensors")
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"]
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
        (adapter,) = discover(folder)
        assert adapter.step == step
        assert len(ma.load_spectra(folder))
    newest, notes = checkpoints.newest_whole(output_dir)
    steps = [step for step in found if step > 0]
    assert not notes
    assert (newest is None) == (not steps)
    assert newest is None or newest == found[max(steps)]
    return len(found)


def differences(run: Path, unbroken: Path) -> list[str]:
    """What differs between two finished runs, bit by bit, times aside."""
    ours, theirs = checkpoints.all_in(run), checkpoints.all_in(unbroken)
    if ours.keys() != theirs.keys():
        return [f"checkpoints {sorted(ours)} and {sorted(theirs)}"]
    different = [
        f"{name} of checkpoint-{step}"
        for step in ours
        for name in ("adapter_model.safetensors", "adapter_config.json")
        if (ours[step] / name).read_bytes() != (theirs[step] / name).read_bytes()
    ]
    last = max(ours)
    states = [torch.load(folders[last] / "optimizer.pt", weights_only=True) for folders in (ours, theirs)]
    if not _equal(*states):
        different.append("optimizer.pt")
    if _log(ours[last]) != _log(theirs[last]):
        different.append("log_history")
    results = [json.loads((folder / "run.json").read_text())["results"] for folder in (run, unbroken)]
    if results[0] != results[1]:
        different.append("results of run.json")
    if leftover := sorted(path.name for path in run.iterdir() if path.name.startswith(".")):
        different.append(f"left behind: {leftover}")
    return different


def _log(folder: Path) -> list[dict[str, Any]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if not k.endswith(_RUNTIME) and "per_second" not in k} for entry in history]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


@dataclass
class Evidence:
    """What a loop of kills has seen."""

    kills: Counter[str] = field(default_factory=Counter)
    partial: int = 0  # kills that left something unfinished, recognised as such
    checkpoints: int = 0  # whole ones read after kills
    runs: int = 0  # brought to their end
    different: list[str] = field(default_factory=list)


def loop(settings: Settings, folder: Path, kills: int, seed: int) -> Evidence:
    """Kill runs until there were ``kills`` kills and the last run has ended; compare each with an unbroken one."""
    rng = random.Random(seed)
    unbroken = replace(settings, output_dir=folder / "unbroken")
    started = time.perf_counter()
    os.waitpid(fork(lambda: train(unbroken, report=print) and None, folder / "unbroken.log"), 0)
    duration = time.perf_counter() - started
    evidence = Evidence()
    while evidence.kills.total() < kills:
        run = replace(settings, output_dir=folder / f"run-{evidence.runs}")
        how: dict[str, Any] = {}
        while True:
            if evidence.kills.total() >= kills:
                how = {}
            elif rng.random() < 0.5:
                how = {"seconds": rng.uniform(0, duration)}
            else:
                how = {"call": rng.randint(1, 60)}
            if not attempt(run, folder / "attempts.log", **how):
                break
            evidence.kills[next(iter(how))] += 1
            evidence.partial += (run.output_dir / PARTIAL).exists()
            evidence.checkpoints += check_whole(run.output_dir)
        evidence.runs += 1
        check_whole(run.output_dir)
        evidence.different += differences(run.output_dir, unbroken.output_dir)
    return evidence


def minilm_settings(folder: Path, **options: Any) -> Settings:
    """The embedded model on few generated sentences, with dropout."""
    for split, size in (("train", 90), ("validation", 60)):
        rows = [{"sentence": e.sentence, "label": e.label} for e in generate(split, size)]  # type: ignore[arg-type]
        (folder / f"acceptability_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = {"model": "minilm", "task": "acceptability", "epochs": 4, "data_dir": folder} | options
    return make_settings(method="msplora", output_dir=folder / "run", **chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", choices=["toy", "minilm"], default="toy")
    parser.add_argument("--save-steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.model == "minilm":
            settings = minilm_settings(folder, save_steps=arguments.save_steps)
        else:
            from tests.core.toys import toy_settings

            settings = toy_settings(folder, save_steps=arguments.save_steps)
        started = time.perf_counter()
        evidence = loop(settings, folder, arguments.kills, arguments.seed)
    print(
        f"{evidence.kills.total()} kills ({evidence.kills['seconds']} at random times, {evidence.kills['call']} at "
        f"random file calls; {evidence.partial} left something unfinished), {evidence.checkpoints} whole checkpoints "
        f"read after them, {evidence.runs} runs brought to their end in {time.perf_counter() - started:.0f} s; "
        f"different from the unbroken run: {', '.join(evidence.different) or 'nothing'}"
    )
    sys.exit(bool(evidence.different))


if __name__ == "__main__":
    main()
