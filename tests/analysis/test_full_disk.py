"""Full disks, and files that may not grow, in every command that writes: one line, and what was there before."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from adapters import lora_tensors, write_adapter
from moment_cases import lora_factors, random_tokens, write_moments
from safetensors.numpy import save_file

RUNS = Path(__file__).parents[2] / "examples" / "runs"
MAIN = "from msplora_analysis.cli import main; main()"
LORA, OTHER = RUNS / "lora-8", RUNS / "msplora-8-8-8"
COMMANDS = {
    "spectra": ["spectra", LORA, "--out"],
    "spectra as csv": ["spectra", LORA, "--format", "csv", "--out"],
    "export": ["export", f"{LORA}/checkpoint-0", "--overwrite", "--out"],
    "redundancy": ["redundancy", LORA, "--out"],
    "figures": ["figures", LORA, "--format", "png", "--format", "pdf", "--format", "svg", "--out"],
    "compare": ["compare", LORA, "--with", OTHER, "--figure", "pdf", "--out"],
    "results": ["results", RUNS, "--out"],
    "compress": ["compress", f"{LORA}/checkpoint-270", "--rank", "2", "--overwrite", "--out"],
    "advise": ["advise", LORA, "--out"],
    "share": ["share", f"{LORA}/checkpoint-270", "--overwrite", "--out"],
    "relate": ["relate", f"{LORA}/checkpoint-270", f"{OTHER}/checkpoint-270", "--out"],
    "compress by moments": ["compress", "{made}/weighed", "--kl", "0.5", "--overwrite", "--out"],
    "merge": ["merge", f"{LORA}/checkpoint-270", f"{OTHER}/checkpoint-270", "--overwrite", "--out"],
    "extract": ["extract", "{made}/tuned", "--base", "{made}/base", "--rank", "4", "--overwrite", "--out"],
    "check": ["check", f"{LORA}/checkpoint-270", "--sarif"],
    "report": ["report", LORA, "--out"],
}
QUICK = ("spectra", "export")
NAMES = {"report": "report.html", "check": "check.sarif"}
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An adapter with its moments, a model and its base."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    tensors = lora_tensors("layer.0.query", "layer.1.query", rank=2, rows=40, cols=50)
    factors = lora_factors(tensors)
    tokens = {name: random_tokens(40, 50, examples=20) for name in factors}
    write_moments(write_adapter(folder / "weighed", tensors), factors, tokens)
    weights = {f"layer.{i}.query.weight": rng.standard_normal((60, 80)) for i in range(2)}
    for name, change in (("base", 0), ("tuned", 1)):
        (folder / name).mkdir()
        moved = {key: value + change * rng.standard_normal((60, 80)) for key, value in weights.items()}
        save_file(moved, folder / name / "model.safetensors")
    return folder


def run(name: str, folder: Path, made: Path, **options) -> subprocess.CompletedProcess:
    out = folder / NAMES.get(name, "out")
    command = [sys.executable, "-c", MAIN, *(str(word).format(made=made) for word in COMMANDS[name]), str(out)]
    environment = os.environ | {"MSPLORA_CACHE": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False, **options)


def content(folder: Path) -> dict[str, bytes]:
    """All files, but what ``extract`` keeps to go on with."""
    files = (path for path in folder.rglob("*") if path.is_file() and "out.unfinished" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("part", [0, 0.9], ids=["from the beginning", "near its end"])
def test_files_that_may_not_grow(tmp_path, made, name, part):
    assert run(name, tmp_path, made).returncode == 0
    before = content(tmp_path)
    limit = int(part * max(map(len, before.values())))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    failed = run(name, tmp_path, made, preexec_fn=limited)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: ")
    assert str(tmp_path) in failed.stderr
    assert "File too large" in failed.stderr
    assert content(tmp_path) == before
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
@pytest.mark.parametrize("name", ALL)
def test_a_really_full_disk(small_disk, made, name):
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    failed = run(name, small_disk, made)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert str(small_disk) in failed.stderr
    assert "No space left on device" in failed.stderr
    assert [path for path in small_disk.rglob("*") if path.is_file()] == [filler]
    assert not list(small_disk.glob("*.unfinished"))


def test_a_full_disk_behind_the_output(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", MAIN, "results", str(RUNS)]
        failed = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600, check=False)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "No space left on device" in failed.stderr


@pytest.mark.skipif(os.name != "posix", reason="closes descriptors as a shell does")
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_outputs_that_whoever_starts_it_has_closed(tmp_path, closed):
    command = f'exec "$0" -c "$1" results "$2" --out "$3" {closed}'
    words = ["sh", "-c", command, sys.executable, MAIN, str(RUNS), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "out").glob("results*"))


# What a killed process leaves

KILLED = """
import os, signal, sys
from pathlib import Path
from msplora_core.atomic import replacing, replacing_folder
with {function}(Path(sys.argv[1])) as beside:
    (beside / "half" if beside.is_dir() else beside).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_while(function: str, path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED.format(function=function), str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [name for name in os.listdir(path.parent) if name.endswith(".tmp")]


@pytest.mark.parametrize("name", ["export", pytest.param("spectra", marks=pytest.mark.slow)])
def test_the_next_run_removes_what_a_killed_one_left(tmp_path, made, name):
    (tmp_path / "out").mkdir()
    place = tmp_path if name == "export" else tmp_path / "out"
    for function in ("replacing", "replacing_folder"):
        kill_while(function, place / "spectra.parquet")
    (place / f".out.{os.getpid()}.tmp").touch()  # of a living process, as version 0.1.0 named it
    (place / ".notes.tmp").touch()  # of somebody else
    assert run(name, tmp_path, made).returncode == 0
    left = {path for path in os.listdir(place) if path.startswith(".")}
    assert left == {f".out.{os.getpid()}.tmp", ".notes.tmp"}
