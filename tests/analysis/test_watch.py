"""``msplora-analyze watch`` on runs that grow: what is read, what is shown, and how it is left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import lora_config, lora_tensors, write_adapter
from rich.console import Console

import msplora_analysis as ma
from msplora_analysis.show.watch.following import Run
from msplora_analysis.show.watch.screen import line, render, rows, sparkline
from msplora_analysis.show.watch.watch import watch

ROOT = Path(ma.__file__).parent.parent
EXAMPLE = Path(__file__).parents[2] / "examples" / "runs" / "msplora-8-8-8"
COMMAND = [sys.executable, "-c", "from msplora_analysis.cli import main; main()", "watch"]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def grow(tmp_path: Path) -> Callable[..., Path]:
    """Copies checkpoints of the example into a run, and gives its folder."""

    def copy(*steps: int) -> Path:
        for step in steps:
            shutil.copytree(EXAMPLE / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
        return tmp_path / "run"

    return copy


def old(folder: Path, seconds: float = 60) -> None:
    """As if nothing had been written there for so long."""
    for file in folder.rglob("*"):
        if file.is_file():
            os.utime(file, (time.time() - seconds,) * 2)


def steps(points: Any) -> list[int | None]:
    return [point.adapter.step for point in points]


def screen(run: Run, width: int = 80, height: int = 24, findings: bool = True) -> str:
    console = Console(width=width, height=height, force_terminal=False, legacy_windows=False, _environ={})
    with console.capture() as capture:
        console.print(render(run, run.findings() if findings else None, console))
    return capture.get()


# What is read


def test_only_what_is_new_is_opened(grow: Any) -> None:
    opened: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if recording and event == "open" and isinstance(arguments[0], str) and "checkpoint-" in arguments[0]:
            opened.append(Path(arguments[0]).parent.name)

    recording = False
    sys.addaudithook(hook)  # it cannot be taken away again, so it is made silent at the end
    run = Run(grow(0, 45), cache=False)
    assert steps(run.update()) == [0, 45]
    run.findings()
    recording = True
    assert steps(run.update()) == []
    assert opened == []
    grow(90)
    assert steps(run.update()) == [90]
    run.findings()
    assert set(opened) == {"checkpoint-90"}
    recording = False


def test_means_are_those_of_the_tables(grow: Any) -> None:
    run = Run(grow(0, 270), cache=False)
    first, last = run.update()
    table = ma.load_metrics(run.folder).query("step == 270").groupby(["scale", "module"])
    assert last.means.keys() == set(table.groups)
    for key, group in table:
        found = last.means[key]
        assert found.effective_rank == pytest.approx(group["effective_rank"].mean(), rel=1e-12)
        assert found.norm == pytest.approx(group["frobenius"].mean(), rel=1e-12)
        assert (found.rank, found.matrices) == (group["rank"].mean(), len(group))
    assert all(means.effective_rank is None and means.norm == 0 for means in first.means.values())


def test_findings_are_those_of_diagnose(grow: Any) -> None:
    run = Run(grow(0, 45, 270), cache=False)
    list(run.update())
    expected = ma.diagnose(run.folder, cache=False)
    found = run.findings()
    assert len(expected)
    assert found[["id", "step", "name", "value"]].equals(expected[["id", "step", "name", "value"]])


def test_a_checkpoint_being_written_is_waited_for(grow: Any) -> None:
    run = Run(grow(0), cache=False)
    list(run.update())
    whole, partial = EXAMPLE / "checkpoint-45", run.folder / "checkpoint-45"
    partial.mkdir()
    weights = (whole / "adapter_model.safetensors").read_bytes()
    (partial / "adapter_model.safetensors").write_bytes(weights[:1000])
    for name in (None, "adapter_config.json", "trainer_state.json"):
        if name:
            shutil.copy(whole / name, partial)
        assert steps(run.update()) == []
        assert run.writing == ["checkpoint-45"]
        assert run.problems == {}
    assert "checkpoint-45 is being written" in screen(run)
    (partial / "adapter_model.safetensors").write_bytes(weights)
    assert steps(run.update()) == [45]
    assert run.writing == []


def test_what_stays_torn_is_told_as_a_problem(grow: Any) -> None:
    run = Run(grow(0, 45), cache=False)
    file = run.folder / "checkpoint-45" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    old(run.folder)
    assert steps(run.update()) == [0]
    assert list(run.problems) == ["checkpoint-45"]
    assert "checkpoint-45 cannot be read" in screen(run)
    shutil.copy(EXAMPLE / "checkpoint-45" / file.name, file)
    assert steps(run.update()) == [45]
    assert run.problems == {}


def test_a_folder_without_state_is_read_once_it_rests(tmp_path: Path) -> None:
    write_adapter(tmp_path / "run" / "checkpoint-5")
    run = Run(tmp_path / "run", cache=False)
    assert steps(run.update()) == []
    assert run.writing == ["checkpoint-5"]
    old(run.folder)
    assert steps(run.update()) == [5]


def test_deleted_checkpoints_stay_in_the_curves(grow: Any) -> None:
    run = Run(grow(0, 45, 90), cache=False)
    list(run.update())
    shutil.rmtree(run.folder / "checkpoint-45")
    assert steps(run.update()) == []
    assert (steps(run.points), run.deleted) == ([0, 45, 90], 1)
    assert "3 checkpoints, 1 deleted since" in screen(run)


def test_a_run_that_starts_anew_is_followed_from_its_start(grow: Any) -> None:
    run = Run(grow(0, 45, 90), cache=False)
    list(run.update())
    shutil.rmtree(run.folder)
    assert steps(run.update()) == []
    assert run.points == []
    grow(0)
    assert steps(run.update()) == [0]
    assert steps(run.points) == [0]


def test_a_checkpoint_written_anew_takes_its_own_place(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-1"
    write_adapter(folder, lora_tensors("layer.0.query", seed=0), epoch=1)
    run = Run(tmp_path / "run", cache=False)
    (before,) = run.update()
    write_adapter(folder, lora_tensors("layer.0.query", seed=1), epoch=1)
    old(folder, 1)
    (after,) = run.update()
    assert steps(run.points) == [1]
    assert before.means != after.means == run.points[0].means


def test_nan_is_a_finding_and_not_an_end(tmp_path: Path) -> None:
    for step in (1, 2):
        tensors = lora_tensors("layer.0.query")
        if step == 2:
            next(iter(tensors.values()))[0, 0] = float("nan")
        write_adapter(tmp_path / "run" / f"checkpoint-{step}", tensors, epoch=step)
    run = Run(tmp_path / "run", cache=False)
    assert steps(run.update()) == [1, 2]
    assert "error" in set(run.findings()["severity"])
    assert "diverged" in line(run.points[1])
    assert "error" in screen(run)


def test_several_runs_are_refused() -> None:
    with pytest.raises(ma.AnalysisError, match=r"holds several runs, such as .*lora-8 and .*msplora-8-8-8; watch one"):
        list(Run(EXAMPLE.parent, cache=False).update())


# What is shown


def test_the_screen_tells_who_when_and_how(grow: Any) -> None:
    shutil.copytree(EXAMPLE, grow(), dirs_exist_ok=True)
    run = Run(grow(), cache=False)
    list(run.update())
    shown = screen(run)
    assert "MSPLoRA 8/8/8 of minilm on acceptability" in shown
    assert "epoch 6 of 6, step 270, 7 checkpoints, finished" in shown
    assert re.search(r"eval_matthews_correlation [▁-█]+ 0\.5142", shown)
    metrics = ma.load_metrics(run.folder).query("scale == 'mid' and module == 'query'")
    means = metrics.groupby("step")["effective_rank"].mean()
    assert re.search(rf"mid +query +[▁-█]+ +{means[270]:.2f} of 8 +{means[270] - means[225]:+.2f} ", shown)
    assert "rank-unused" in shown
    assert max(map(len, shown.splitlines())) <= 80
    wide = screen(run, 200)
    learned = means[means.notna()]
    assert re.search(rf"mid +query .*{learned.min():.2f} to {learned.max():.2f} .* 0\.00 to ", wide)


def big_run(folder: Path) -> Run:
    """Seven modules of three scales and their total, at 6 checkpoints."""
    names = [f"model.layers.{layer}.{module}" for layer in range(3) for module in MODULES]
    for step in range(6):
        tensors = {}
        for name in names:
            for scale in ("global", "mid", "layer"):
                if scale != "global" or ".0." in name:
                    pair = lora_tensors("x", seed=step)
                    tensors[f"base_model.model.{name}.msplora_{scale}.A"] = pair["base_model.model.x.lora_A.weight"]
                    tensors[f"base_model.model.{name}.msplora_{scale}.B"] = pair["base_model.model.x.lora_B.weight"]
        config = {"peft_type": "MSPLORA", "ranks": {"global": 2, "mid": 2, "layer": 2}, "lora_alpha": 4}
        write_adapter(folder / f"checkpoint-{step}", tensors, config, epoch=step)
    run = Run(folder, cache=False)
    list(run.update())
    return run


def test_many_modules_fit_any_terminal(tmp_path: Path) -> None:
    run = big_run(tmp_path / "run")
    for width, height in ((80, 24), (60, 16), (200, 60), (100, 50)):
        shown = screen(run, width, height).splitlines()
        assert len(shown) < height, (width, height)
        assert max(map(len, shown)) <= width
        text = "\n".join(shown)
        if height > 30:
            assert len(re.findall(r"(?m)^(global|mid|layer|total) +\w+_proj ", text)) == 28
        else:
            assert re.findall(r"(?m)^(\w+) +7 modules ", text) == ["global", "mid", "layer", "total"]


def test_rows_of_a_scale_are_means_over_all_its_matrices(tmp_path: Path) -> None:
    tensors = lora_tensors("layer.0.a", "layer.1.a", "layer.0.b", rank=2)
    tensors["base_model.model.layer.0.b.lora_B.weight"][:] = 0
    write_adapter(tmp_path / "run" / "checkpoint-1", tensors, lora_config(), epoch=1)
    run = Run(tmp_path / "run", cache=False)
    list(run.update())
    (row,) = rows(run.points, most=1)
    metrics = ma.load_metrics(run.folder)
    assert row.module == "2 modules"
    assert row.means[0].effective_rank == pytest.approx(metrics["effective_rank"].mean())  # of those that have one
    assert row.means[0].norm == pytest.approx(metrics["frobenius"].mean())


@pytest.mark.parametrize(
    ("values", "options", "bars"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], {}, "▁▂▃▄▅▆▇█"),
        ([None, 5.0, None, 6.0], {}, " ▁ █"),
        ([3.0, 3.0], {}, "▅▅"),
        ([0.0, 0.0], {"zero": True}, "▁▁"),
        ([7.0, 8.0], {"zero": True}, "▇█"),
        ([None, None], {}, "  "),
        ([], {}, ""),
    ],
)
def test_sparklines(values: list[float | None], options: dict[str, Any], bars: str) -> None:
    assert sparkline(values, 8, **options) == bars


def test_a_long_sparkline_shows_its_end() -> None:
    assert sparkline([9.0, *range(8)], 8) == "▁▂▃▄▅▆▇█"


def test_once_shows_and_ends(grow: Any, capsys: pytest.CaptureFixture[str]) -> None:
    watch(grow(0, 45), once=True, cache=False)
    assert "epoch 1 of 6, step 45, 2 checkpoints" in capsys.readouterr().out


def test_bad_paths_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("file", "not a folder"),
        ("no/run", "no such folder, nor the one it would be in"),
        ("empty", "no adapter in it yet"),
        ("unmade", "no adapter in it yet"),
    ):
        with pytest.raises(ma.AnalysisError, match=message):
            watch(tmp_path / path, once=True, cache=False)


# How it is left


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "LINES": "24", "TERM": "xterm", "PYTHONUTF8": "1"}


def test_without_a_terminal_a_line_a_checkpoint(grow: Any) -> None:
    folder = grow(0, 45)
    with subprocess.Popen(
        [*COMMAND, str(folder), "--interval", "0.1"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        grow(90)
        lines.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
    assert [text.split("  ")[0] for text in lines] == ["epoch 0, step 0", "epoch 1, step 45", "epoch 2, step 90"]
    assert (rest, errors, process.returncode) == ("", "", 0)


@pytest.mark.parametrize("leave", [b"q", b"\x03", signal.SIGTERM], ids=["q", "Ctrl-C", "kill"])
def test_a_terminal_is_left_as_it_was(leave: bytes | signal.Signals, grow: Any) -> None:
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    folder = grow()
    controller, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    process = subprocess.Popen(
        [*COMMAND, str(folder), "--interval", "0.1"], stdin=terminal, stdout=terminal, stderr=terminal,
        env=environment(), start_new_session=True, preexec_fn=lambda: _control(terminal),
    )  # fmt: skip
    shown = _read_until(controller, "waiting for")
    assert termios.tcgetattr(terminal)[3] & termios.ECHO == 0  # keys are not shown
    grow(0)
    shown += _read_until(controller, "q or Ctrl-C leaves", "1 checkpoint")
    if isinstance(leave, bytes):
        os.write(controller, leave)
    else:
        process.send_signal(leave)
    shown += _read_until(controller, "\x1b[?1049l")  # back to the user's own screen
    _drain(controller, process)
    assert process.returncode == (0 if isinstance(leave, bytes) else 128 + signal.SIGTERM)
    assert termios.tcgetattr(terminal) == before
    assert shown.count("\x1b[?25l") <= shown.count("\x1b[?25h") + 1  # the cursor is back, once all is read
    os.close(controller)
    os.close(terminal)


def _control(terminal: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def _read_until(controller: int, *texts: str) -> str:
    import select

    shown = ""
    until = time.monotonic() + 600
    while not all(text in shown for text in texts):
        assert time.monotonic() < until, shown
        if select.select([controller], [], [], 1)[0]:
            shown += os.read(controller, 65536).decode(errors="replace")
    return shown


def _drain(controller: int, process: subprocess.Popen[bytes]) -> None:
    """Read what still comes, without which the command could not end."""
    import select

    until = time.monotonic() + 600
    while process.poll() is None:
        assert time.monotonic() < until
        if select.select([controller], [], [], 0.05)[0]:
            os.read(controller, 65536)


def test_run_json_that_is_being_written_is_read_later(grow: Any) -> None:
    folder = grow(0)
    record = folder / "run.json"
    record.write_text('{"settings": {"task": "co')
    run = Run(folder, cache=False)
    list(run.update())
    assert run.settings == {}
    record.write_text(json.dumps({"settings": {"task": "cola"}, "results": []}))
    list(run.update())
    assert (run.settings, run.finished) == ({"task": "cola"}, True)
