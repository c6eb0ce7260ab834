"""Many adapters: whatever computes them, the tables are the same; broken ones, interruption, the cache."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from adapters import lora_config, lora_tensors, write_adapter

from msplora_analysis import AnalysisError, load_spectra, load_tables
from msplora_analysis.adapters.discovery import discover
from msplora_analysis.compute import tasks as engine
from msplora_analysis.compute.cache import Cache, open_cache
from msplora_analysis.compute.results import Failure, Spectra, joined
from msplora_analysis.options import Execution, Options

MAIN = "from msplora_analysis.cli import main; main()"
NAMES = [f"layer.{layer}.{module}" for layer in range(3) for module in ("query", "value")]


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two runs of seven checkpoints each, of different ranks."""
    for run, rank in (("a", 2), ("b", 5)):
        for step in range(7):
            tensors = lora_tensors(*NAMES, rank=rank, rows=40, cols=30, seed=10 * rank + step)
            write_adapter(tmp_path / "runs" / run / f"checkpoint-{step}", tensors, lora_config(r=rank), epoch=step)
    return tmp_path / "runs"


def settle(folder: Path) -> None:
    """Make the files old enough for the cache."""
    time.sleep(0.05)
    for file in folder.rglob("*.safetensors"):
        os.utime(file, (1e9, 1e9))


def analyze(*args, code: str = MAIN, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)


# Same tables, whoever computes


@pytest.mark.parametrize("task_bytes", [900, 6000, 2**24])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_tables_do_not_depend_on_workers_or_tasks(runs, monkeypatch, workers, task_bytes):
    expected = load_tables(runs, workers=1)
    monkeypatch.setattr(engine, "_TASK", task_bytes)  # adapters of about 5 kB become one or many tasks each
    for table, other in zip(expected, load_tables(runs, workers=workers), strict=True):
        pd.testing.assert_frame_equal(table, other, check_exact=True)


def test_files_are_identical_too(runs, tmp_path):
    for workers in (1, 2):
        assert analyze("spectra", runs, "--out", tmp_path / str(workers), "--workers", workers).returncode == 0
    for name in ("spectra.parquet", "metrics.parquet"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_processes_may_be_started_beside_threads(runs):
    """A process with threads may not be copied: the workers then start afresh."""
    code = (
        "import threading, msplora_analysis as ma\n"
        "if __name__ == '__main__':\n"
        "    stop = threading.Event(); threading.Thread(target=stop.wait).start()\n"
        f"    print(len(ma.load_spectra({str(runs)!r}, workers=2))); stop.set()\n"
    )
    script = runs.parent / "script.py"
    script.write_text(code)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert (result.stdout.strip(), result.stderr) == (str(7 * 6 * 7), "")


def test_a_dask_cluster_gives_the_same_tables(runs, monkeypatch):
    distributed = pytest.importorskip("distributed")
    expected = load_tables(runs, workers=1)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        computed = load_tables(runs, dask=cluster.scheduler_address, cache=False)
    for table, other in zip(expected, computed, strict=True):
        pd.testing.assert_frame_equal(table, other, check_exact=True)


def test_a_dask_scheduler_that_is_not_there(runs, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("msplora_analysis.compute.executors._PATIENCE", 0.5)
    with pytest.raises(AnalysisError, match=r"dask=tcp://127.0.0.1:1: no scheduler can be reached") as caught:
        load_spectra(runs, dask="tcp://127.0.0.1:1")
    assert "\n" not in str(caught.value)


def test_progress_counts_adapters_and_their_parts(runs, monkeypatch):
    monkeypatch.setattr(engine, "_TASK", 2000)
    calls: list[tuple[float, int]] = []
    load_tables(runs, workers=1, progress=lambda done, total: calls.append((done, total)))
    done = [d for d, _ in calls]
    assert done == sorted(done)
    assert done[-1] == 14
    assert set(range(1, 15)) < set(done)
    assert {total for _, total in calls} == {14}


# Broken adapters


def test_a_broken_adapter_is_a_result_of_its_own(runs):
    broken = runs / "a" / "checkpoint-3" / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-5])
    for workers in (1, 2):
        results = list(engine.compute(discover(runs), Options(), Execution(workers)))
        assert [type(r) for r in results] == [Failure if i == 3 else Spectra for i in range(14)]
        assert results[3].message.startswith(f"{broken}: not a complete safetensors file")


def test_one_bad_adapter_ends_the_command_and_leaves_old_tables(runs, tmp_path):
    out = tmp_path / "out"
    assert analyze("spectra", runs, "--out", out).returncode == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (runs / "b" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"")
    result = analyze("spectra", runs, "--out", out)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"{runs}/b/checkpoint-2/adapter_model.safetensors" in result.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_keep_going_leaves_out_bad_adapters_and_lists_them(runs, tmp_path):
    whole = load_spectra(runs)
    bad = [("a", 0), ("b", 6)]
    for run, step in bad:
        (runs / run / f"checkpoint-{step}" / "adapter_model.safetensors").write_bytes(b"")
    result = analyze("spectra", runs, "--out", tmp_path / "out", "--keep-going", "--workers", 2)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    for line, (run, step) in zip(lines, bad, strict=False):
        assert line.startswith(f"error: {runs}/{run}/checkpoint-{step}/adapter_model.safetensors: ")
    assert lines[-1] == "error: 2 of 14 adapters are left out"
    kept = pd.read_parquet(tmp_path / "out" / "spectra.parquet")
    left_out = (whole["run"] + "/" + whole["step"].astype(str)).isin(["a/0", "b/6"])
    pd.testing.assert_frame_equal(kept, whole[~left_out].reset_index(drop=True))


def test_nothing_is_written_if_every_adapter_is_bad(runs, tmp_path):
    for file in runs.rglob("*.safetensors"):
        file.write_bytes(b"")
    result = analyze("spectra", runs, "--out", tmp_path / "out", "--keep-going")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 15
    assert list((tmp_path / "out").iterdir()) == []


# Interruption


# The first three adapters are computed, the others when the file "go" is there.
HELD = """
import os, time
from msplora_analysis.compute import tasks as engine
compute = engine._spectra
done = 0
def held(*args):
    global done
    done += 1
    while done > 3 and not os.path.exists(os.environ["GO"]):
        time.sleep(0.01)
    return compute(*args)
engine._spectra = held
from msplora_analysis.cli import main
main()
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_valid_tables_that_a_second_call_completes(runs, tmp_path, workers):
    settle(runs)
    time.sleep(2.1)  # until the change of the files' times is old too
    environment = {**os.environ, "MSPLORA_CACHE": str(tmp_path / "cache"), "GO": str(tmp_path / "go")}
    out = tmp_path / "out"
    command = ["spectra", str(runs), "--out", str(out), "--workers", str(workers)]
    code = "from msplora_analysis.compute import tasks as engine; engine._TASK = 6000\n" + HELD
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True, env=environment
    )
    cache = tmp_path / "cache" / "spectra-2.sqlite"
    while not (cache.exists() and cached(cache) >= 2) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    (tmp_path / "go").touch()
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert stderr.startswith("interrupted: ")
    part = pd.read_parquet(out / "spectra.parquet")
    whole = load_spectra(runs)
    assert 0 < len(part) < len(whole)
    pd.testing.assert_frame_equal(part, whole[: len(part)])

    assert analyze(*command, MSPLORA_CACHE=environment["MSPLORA_CACHE"]).returncode == 0
    pd.testing.assert_frame_equal(pd.read_parquet(out / "spectra.parquet"), whole)
    assert sorted(file.name for file in out.iterdir()) == ["metrics.parquet", "spectra.parquet"]


def cached(path: Path) -> int:
    import sqlite3

    try:
        with sqlite3.connect(path, timeout=1) as database:
            return database.execute("SELECT count(*) FROM spectra").fetchone()[0]
    except sqlite3.Error:
        return 0


# The cache


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache that takes files of any age."""
    monkeypatch.setenv("MSPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("msplora_analysis.compute.cache._SETTLED", -1)
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The files that are really read, as long as one process does the work."""
    files = []
    compute = engine._spectra

    def counting(piece, options):
        files.append("/".join(Path(piece.adapter.file).parts[-3:-1]))
        return compute(piece, options)

    monkeypatch.setattr(engine, "_spectra", counting)
    return files


def test_a_second_call_reads_only_what_is_new(runs, cache, computed):
    first = load_tables(runs)
    assert len(computed) == 14
    computed.clear()
    again = load_tables(runs)
    assert computed == []
    for table, other in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(table, other, check_exact=True)

    write_adapter(runs / "b" / "checkpoint-9", lora_tensors(*NAMES, rank=5, seed=9), lora_config(r=5), epoch=9)
    grown = load_spectra(runs)
    assert computed == ["b/checkpoint-9"]
    assert len(grown) == len(first.spectra) + 6 * 5


def test_whatever_decides_the_result_makes_it_new(runs, cache, computed):
    folder = runs / "a" / "checkpoint-0"
    before = load_spectra(folder)
    computed.clear()

    # Same size, same time of modification, other numbers.
    file = folder / "adapter_model.safetensors"
    status = file.stat()
    data = bytearray(file.read_bytes())
    values = np.frombuffer(data, dtype="<f4", offset=len(data) - 80)
    values *= 2
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not load_spectra(folder)["sigma"].equals(before["sigma"])

    (folder / "adapter_config.json").write_text(json.dumps(lora_config(r=2, lora_alpha=40)))
    load_spectra(folder)
    load_spectra(folder, ignore_unknown=True)
    assert len(computed) == 3
    load_spectra(folder)
    assert len(computed) == 3


def test_a_file_that_has_just_changed_is_not_kept(runs, cache, computed, monkeypatch):
    monkeypatch.setattr("msplora_analysis.compute.cache._SETTLED", 60)
    load_spectra(runs)
    load_spectra(runs)
    assert len(computed) == 28


def test_failures_are_not_kept(runs, cache, computed):
    (runs / "a" / "checkpoint-0" / "adapter_config.json").write_text(json.dumps(lora_config(r=3)))
    for _ in range(2):
        with pytest.raises(AnalysisError):
            load_spectra(runs / "a" / "checkpoint-0")
    assert len(computed) == 2


def test_no_cache_on_request(runs, cache, computed, monkeypatch):
    load_spectra(runs)
    load_spectra(runs, cache=False)
    monkeypatch.setenv("MSPLORA_CACHE", "")
    load_spectra(runs)
    assert len(computed) == 3 * 14


def test_a_damaged_or_forbidden_cache_is_no_failure(runs, cache, computed, monkeypatch):
    load_spectra(runs)
    (file,) = cache.glob("*.sqlite")
    file.write_bytes(b"not a database" * 1000)
    load_spectra(runs)
    monkeypatch.setenv("MSPLORA_CACHE", "/dev/null/x")
    assert open_cache() is None
    load_spectra(runs)
    assert len(computed) == 3 * 14


def test_a_cache_whose_own_schema_is_damaged_is_made_anew(runs, cache, computed):
    expected = load_spectra(runs)
    (file,) = cache.glob("*.sqlite")
    file.write_bytes(file.read_bytes().replace(b"CREATE TABLE", b"CREATE \xff\xff\xff\xff\xff"))
    pd.testing.assert_frame_equal(load_spectra(runs), expected)
    assert len(computed) == 2 * 14


def test_entries_that_make_no_sense_are_computed_again(runs, cache, computed):
    import sqlite3

    load_spectra(runs)
    (file,) = cache.glob("*.sqlite")
    with sqlite3.connect(file) as database:
        database.execute("UPDATE spectra SET sigma = x'0011'")
    expected = load_spectra(runs, cache=False)
    pd.testing.assert_frame_equal(load_spectra(runs), expected)


def test_notes_and_left_out_tensors_are_told_from_the_cache_too(tmp_path, cache):
    tensors = {**lora_tensors("layer.0.query"), "strange": np.ones(3, dtype=np.float32)}
    folder = write_adapter(tmp_path / "a", tensors)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"unknown tensors \(1\): strange are left out"):
            load_spectra(folder, ignore_unknown=True)


def test_the_cache_itself_gives_back_what_was_put(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("msplora_analysis.compute.cache._SETTLED", -1)
    (adapter, *_), options = discover(runs), Options()
    (result,) = engine.compute([adapter], options, Execution())
    store = Cache(tmp_path / "c.sqlite")
    assert store.get(adapter, options) is None
    store.put(adapter, options, result)
    found = store.get(adapter, options)
    store.close()
    assert list(found.rows) == list(result.rows)
    for values, other in zip(found.sigma, result.sigma, strict=True):
        np.testing.assert_array_equal(values, other)


def test_notes_of_every_part_are_kept(runs):
    adapter = discover(runs)[0]
    first, second = (Spectra(adapter, [], [], [], notes) for notes in (["a"], ["a", "b"]))
    assert joined([first, second]).notes == ["a", "b"]
