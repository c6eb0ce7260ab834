"""A new training method is one file: its option is in the command, in run.json and in what may be resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import msplora_core.methods as methods

from .toys import save_data, save_model

METHOD = '''
"""LoRA whose B is kept small: a toy."""

from dataclasses import dataclass
from typing import Annotated

from msplora_core.methods.base import Training
from msplora_core.methods.lora import LoraMethod
from msplora_core.options import POSITIVE, Option


@dataclass(frozen=True)
class SmallLora(LoraMethod):
    """LoRA with a bound on B"""

    name = "small"

    bound: Annotated[float, Option("Largest value of B.", POSITIVE)] = 0.5

    def training(self, model, seed):
        return Clipping(model, self.bound)


class Clipping(Training):
    def __init__(self, model, bound):
        self.factors = [p for name, p in model.named_parameters() if "lora_B" in name]
        self.bound = bound

    def after_update(self, step):
        for factor in self.factors:
            factor.data.clamp_(-self.bound, self.bound)
'''


def msplora_train(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, with the method's file imported; inside msplora_core/methods it would be found by itself."""
    code = "import small, msplora_core.cli; msplora_core.cli.main()"
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_new_method_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(METHOD)
    text = msplora_train(tmp_path, "--help").stdout
    assert "LoRA with a bound on B" in text
    assert "Largest value of B.  [default: 0.5]" in text

    run = tmp_path / "run"
    options = ["--model", save_model(tmp_path / "model"), "--data-dir", save_data(tmp_path / "data"), "--task", "cola"]
    options += ["--epochs", 1, "--batch-size", 8, "--learning-rate", 0.1, "--output-dir", run]
    done = msplora_train(tmp_path, *options, "--method", "small", "--bound", 0.01)
    assert done.returncode == 0, done.stderr
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert (settings["method"], settings["bound"], settings["rank"], settings["bottleneck"]) == ("small", 0.01, 8, None)
    tensors = load_file(run / "checkpoint-3" / "adapter_model.safetensors")
    largest = max(float(tensor.abs().max()) for name, tensor in tensors.items() if "lora_B" in name)
    assert abs(largest - 0.01) < 1e-8  # what it does in every step

    other = msplora_train(tmp_path, *options, "--method", "small", "--bound", 0.02, "--resume")
    assert other.returncode == 1
    assert "bound 0.01 -> 0.02" in other.stderr
    wrong = msplora_train(tmp_path, *options, "--method", "small", "--bound", 0, "--overwrite")
    assert "--bound=0.0: expected a number above 0" in wrong.stderr
    foreign = msplora_train(tmp_path, *options, "--method", "lora", "--bound", 1, "--overwrite")
    assert "--bound is no option of the method lora" in foreign.stderr
    assert "belongs to small" in foreign.stderr


def test_every_file_of_the_folder_is_a_method() -> None:
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert set(methods.METHODS) == files
