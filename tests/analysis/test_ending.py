"""However a command ends, its workers end with it, and nothing half-written stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from adapters import lora_tensors, write_adapter

# A worker says who it is, and then computes for long.
HELD = """
import os, threading, time
from pathlib import Path
from msplora_analysis.compute import tasks

compute = tasks._spectra

def held(*args):
    Path(os.environ["WORKERS"], str(os.getpid())).touch()
    time.sleep(float(os.environ.get("SECONDS", 1000)))
    return compute(*args)

tasks._spectra = held
tasks._TASK = 1000
if __name__ == "__main__":
    if os.environ.get("THREAD"):  # a process with threads is not copied: workers start afresh
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    from msplora_analysis.cli import main
    main()
"""


@pytest.fixture
def start(tmp_path):
    """Starts ``spectra`` with two workers; returns the process and the workers' ids once they compute."""
    for step in range(4):
        write_adapter(tmp_path / "run" / f"checkpoint-{step}", lora_tensors("layer.0.query"), epoch=step)
    (tmp_path / "workers").mkdir()
    (tmp_path / "script.py").write_text(HELD)
    processes = []

    def start(*options: str, workers: int = 2, **environment: str) -> tuple[subprocess.Popen, list[int]]:
        command = [sys.executable, tmp_path / "script.py", "spectra", tmp_path / "run", "--out", tmp_path / "out"]
        environment |= {"WORKERS": str(tmp_path / "workers"), "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            [*map(str, command), "--workers", str(workers), *options], env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        while len(found := list((tmp_path / "workers").iterdir())) < workers:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        return process, [int(path.name) for path in found]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("started", ["copied", pytest.param("afresh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP], ids=lambda number: number.name)
def test_workers_end_with_the_command(start, tmp_path, number, started):
    process, workers = start(**({"THREAD": "1"} if started == "afresh" else {}))
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)  # returns once nobody holds stdout or stderr
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if (number, started) != (signal.SIGKILL, "afresh"):  # then Python tells of semaphores
        assert stderr == ""
    assert stdout == ""
    while not all(map(ended, workers)):  # else the time limit of the suite
        time.sleep(0.02)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_terminal_that_is_closed_ends_all_of_it(start):
    process, workers = start()
    os.killpg(process.pid, signal.SIGHUP)  # as the kernel does
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 128 + signal.SIGHUP
    assert all(map(ended, workers))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_cluster_forgets_the_work_of_a_command_that_ended(start, tmp_path, monkeypatch, number):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))  # the cluster's processes have both
    monkeypatch.setenv("WORKERS", str(tmp_path / "workers"))
    monkeypatch.setenv("SECONDS", "2")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        process, _ = start("--dask", cluster.scheduler_address)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        assert len(stderr.splitlines()) <= 1, stderr
        with distributed.Client(cluster) as client:
            while client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
                time.sleep(0.05)
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
