"""Files that change while they are read, or behind the cache: a number is of one moment, or there is an error."""

import json
import os
import shutil
import sqlite3
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from adapters import lora_config, lora_tensors, write_adapter
from moment_cases import lora_factors, random_tokens, write_moments
from safetensors.numpy import save_file

import msplora_analysis as ma
from msplora_analysis import AnalysisError, load_redundancy, load_spectra
from msplora_analysis.compute import tasks

NAMES = [f"layer.{layer}.query" for layer in range(4)]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tensors(seed: int) -> dict[str, np.ndarray]:
    return lora_tensors(*NAMES, rank=3, rows=40, cols=30, seed=seed)


@pytest.fixture
def old(tmp_path) -> Path:
    return write_adapter(tmp_path / "runs" / "old", tensors(1), lora_config(r=3))


@pytest.fixture
def new(tmp_path) -> Path:
    """Another adapter whose file has the same size."""
    return write_adapter(tmp_path / "new", tensors(2), lora_config(r=3))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache that takes files of any age; no pause before a file is read again."""
    monkeypatch.setenv("MSPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("msplora_analysis.compute.cache._SETTLED", -1)
    monkeypatch.setattr(tasks, "_PAUSE", 0)
    return tmp_path / "cache"


def values(folder: Path) -> list[float]:
    """What is in the file now."""
    return load_spectra(folder, cache=False)["sigma"].tolist()


def meanwhile(
    monkeypatch, act: Callable[[], None], *, name: str = "_spectra", after: bool = True, times: int = 1
) -> list:
    """Have ``act`` happen once (``times``) before or after a step of the work; returns the list of its calls."""
    step, done = getattr(tasks, name), []

    def disturbed(*args):
        result = step(*args) if after else None
        if len(done) < times:
            done.append(args)
            act()
        return result if after else step(*args)

    monkeypatch.setattr(tasks, name, disturbed)
    return done


def replace(old: Path, new: Path) -> None:
    """A whole new file takes the place of the old one, with its size and time."""
    status = (old / WEIGHTS).stat()
    shutil.copy(new / WEIGHTS, old / "beside")
    os.utime(old / "beside", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(old / "beside", old / WEIGHTS)


def overwrite(old: Path, new: Path) -> None:
    """The same file gets other bytes, half of them, and its old time."""
    status, data = (old / WEIGHTS).stat(), (new / WEIGHTS).read_bytes()
    with open(old / WEIGHTS, "r+b") as file:
        file.seek(len(data) // 2)
        file.write(data[len(data) // 2 :])
    os.utime(old / WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [replace, overwrite])
@pytest.mark.parametrize("after", [False, True], ids=["before it is opened", "before the result is kept"])
def test_the_cache_keeps_nothing_under_another_files_name(old, new, monkeypatch, change, after):
    done = meanwhile(monkeypatch, lambda: change(old, new), after=after)
    load_spectra(old)
    assert len(done) == 1
    assert load_spectra(old)["sigma"].tolist() == values(old)


def test_a_link_that_leads_elsewhere_for_a_moment(old, new, monkeypatch):
    link = old.parent / "link"
    link.symlink_to(old)

    def lead(target: Path) -> None:
        link.unlink()
        link.symlink_to(target)

    meanwhile(monkeypatch, lambda: lead(new), after=False)
    meanwhile(monkeypatch, lambda: lead(old))
    load_spectra(link)
    for _ in range(2):
        assert load_spectra(link)["sigma"].tolist() == values(old)


@pytest.mark.parametrize("change", [replace, overwrite])
@pytest.mark.parametrize("load", [load_spectra, lambda path: load_redundancy(path).pairs], ids=["spectra", "pairs"])
def test_a_file_that_changes_while_it_is_read_is_read_again(old, new, monkeypatch, change, load):
    from msplora_analysis.files.safetensors import SafetensorsFile

    read, left = SafetensorsFile.prefetch, [1]

    def disturbed(self, names):
        read(self, names)
        if left and self.path.parent == old:
            left.pop()
            change(old, new)

    monkeypatch.setattr(SafetensorsFile, "prefetch", disturbed)
    found = load(old)
    assert left == []
    pd.testing.assert_frame_equal(found, load(old), check_exact=True)
    if load is load_spectra:
        assert found["sigma"].tolist() == values(old)


def test_a_file_that_never_rests_is_an_error(old, new, monkeypatch):
    done = meanwhile(monkeypatch, lambda: overwrite(old, new), name="adapter_spectra", times=99)
    with pytest.raises(AnalysisError, match=rf"{old / WEIGHTS}: it changed while it was read; try again") as caught:
        load_spectra(old)
    assert "\n" not in str(caught.value)
    assert 1 < len(done) < 99


def test_a_file_that_is_replaced_between_two_parts_of_the_work(old, new, monkeypatch):
    monkeypatch.setattr(tasks, "_TASK", 4000)
    done = meanwhile(monkeypatch, lambda: replace(old, new))
    assert load_spectra(old)["sigma"].tolist() == values(new)
    assert done[0][0].parts > 1


def test_weights_are_not_scaled_by_another_configuration(old, monkeypatch):
    meanwhile(monkeypatch, lambda: (old / CONFIG).write_text(json.dumps(lora_config(r=3, lora_alpha=99))), after=False)
    with pytest.raises(AnalysisError, match=rf"{old / WEIGHTS}: the configuration beside it changed"):
        load_spectra(old)
    assert load_spectra(old)["sigma"].tolist() == values(old)


@pytest.mark.parametrize(
    "changed", ["tuned/two.safetensors", "base/two.safetensors", "base/model.safetensors.index.json"]
)
def test_shards_and_the_base_count(tmp_path, changed):
    rng = np.random.default_rng(0)
    for folder in ("tuned", "base"):
        (tmp_path / folder).mkdir()
        for shard in ("one", "two"):
            weights = {f"layer.{shard}.weight": rng.normal(size=(6, 5)).astype(np.float32)}
            save_file(weights, tmp_path / folder / f"{shard}.safetensors", {"format": "pt"})
        index = {"weight_map": {f"layer.{shard}.weight": f"{shard}.safetensors" for shard in ("one", "two")}}
        (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def load(**options) -> list[float]:
        return load_spectra(tmp_path / "tuned", base=tmp_path / "base", **options)["sigma"].tolist()

    before = load()
    assert load() == before
    if changed.endswith(".json"):
        shutil.copy(tmp_path / "base/two.safetensors", tmp_path / "base/other.safetensors")
        text = (tmp_path / changed).read_text().replace("two.safe", "other.safe")
        (tmp_path / changed).write_text(text)
        save_file({"layer.two.weight": np.ones((6, 5), np.float32)}, tmp_path / "base/other.safetensors")
    else:
        save_file({"layer.two.weight": np.ones((6, 5), np.float32)}, tmp_path / changed, {"format": "pt"})
    assert load() == load(cache=False) != before


def test_a_number_that_rots_in_the_cache_is_computed_again(old, cache):
    expected = load_spectra(old)
    (file,) = cache.glob("*.sqlite")
    with sqlite3.connect(file) as database:
        (sigma,) = database.execute("SELECT sigma FROM spectra").fetchone()
        database.execute("UPDATE spectra SET sigma = ?", (sigma[:-1] + bytes([sigma[-1] ^ 1]),))
    pd.testing.assert_frame_equal(load_spectra(old), expected, check_exact=True)


SENSELESS = {
    "a shape of no matrix": lambda stored: stored["rows"][0].__setitem__(4, -1),
    "more values than a matrix has": lambda stored: stored["rows"][0].__setitem__(5, 1),
    "lengths that do not add up": lambda stored: stored["lengths"].__setitem__(0, 2**62),
    "a name that is a number": lambda stored: stored["rows"][0].__setitem__(3, 7),
    "a scale that is a list": lambda stored: stored["rows"][0].__setitem__(0, ["layer"]),
    "notes that are none": lambda stored: stored.__setitem__("notes", 3),
    "no unknown tensors": lambda stored: stored.pop("unknown"),
    "a norm that is none": lambda stored: stored["rows"][0].__setitem__(7, float("nan")),
}


@pytest.mark.parametrize("spoil", SENSELESS.values(), ids=SENSELESS)
def test_an_entry_without_sense_is_computed_again_though_its_digest_is_right(old, cache, spoil):
    from msplora_analysis.compute.cache import _digest

    expected = load_spectra(old)
    (file,) = cache.glob("*.sqlite")
    with sqlite3.connect(file) as database:
        key, rows, sigma = database.execute("SELECT key, rows, sigma FROM spectra").fetchone()
        stored = json.loads(zlib.decompress(rows))
        spoil(stored)
        rows = zlib.compress(json.dumps(stored).encode())
        database.execute("UPDATE spectra SET rows = ?, digest = ?", (rows, _digest(key, rows, sigma)))
    pd.testing.assert_frame_equal(load_spectra(old), expected, check_exact=True)


@pytest.mark.slow
def test_an_entry_that_would_unpack_to_gigabytes_is_computed_again(old, cache):
    from msplora_analysis.compute.cache import _digest

    expected = load_spectra(old)
    (file,) = cache.glob("*.sqlite")
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(2**24)) for _ in range(20)) + packer.flush()
    with sqlite3.connect(file) as database:
        key, sigma = database.execute("SELECT key, sigma FROM spectra").fetchone()
        database.execute("UPDATE spectra SET rows = ?, digest = ?", (rows, _digest(key, rows, sigma)))
    pd.testing.assert_frame_equal(load_spectra(old), expected, check_exact=True)


# Moments beside an adapter


@pytest.mark.parametrize("command", ["pairs", "compress", "advise"])
def test_moments_that_are_replaced_while_they_are_used(old, tmp_path, monkeypatch, command):
    from msplora_analysis.adapters import moments

    factors = lora_factors(tensors(1), lora_config()["lora_alpha"] / 3)
    file = write_moments(old, factors, {name: random_tokens(40, 30, examples=4) for name in factors})
    fresh = load_redundancy(old).pairs
    read, left = moments.read_moments, [1]

    def disturbed(path, **options):
        found = read(path, **options)
        if left:
            left.pop()
            shutil.copy(path, path.parent / "beside")
            os.replace(path.parent / "beside", path)
        return found

    if command == "advise":  # spectra read them first, undisturbed
        from msplora_analysis.ask.advice import gather

        tables_of = gather.tables_of
        left.clear()
        monkeypatch.setattr(gather, "tables_of", lambda *args: left.append(1) or tables_of(*args))
    monkeypatch.setattr(moments, "read_moments", disturbed)
    if command == "pairs":  # read again
        pd.testing.assert_frame_equal(load_redundancy(old).pairs, fresh, check_exact=True)
        assert left == []
        return
    with pytest.raises(AnalysisError, match=rf"{file}: it changed while it was read; try again"):
        ma.advise(old) if command == "advise" else ma.compress(old, tmp_path / "small", rank=1)
    assert not (tmp_path / "small").exists()


def test_a_cache_that_is_no_database_is_made_anew(old, cache, monkeypatch):
    load_spectra(old)
    (file,) = cache.glob("*.sqlite")
    file.write_bytes(b"rotten" * 1000)
    load_spectra(old)
    monkeypatch.setattr(tasks, "_spectra", None)  # not computed again
    load_spectra(old)


@pytest.mark.parametrize("now", [0.0, 4e9], ids=["set back", "put forward"])
def test_a_clock_that_jumps_makes_no_wrong_number(old, new, monkeypatch, now):
    monkeypatch.setattr("msplora_analysis.compute.cache._SETTLED", 2)
    monkeypatch.setattr("msplora_analysis.compute.cache.time.time", lambda: now)
    for change in (replace, overwrite):
        load_spectra(old)
        change(old, new)
        assert load_spectra(old)["sigma"].tolist() == values(old)


def test_what_a_format_of_another_package_read_is_not_kept(old, monkeypatch):
    monkeypatch.setattr(tasks, "is_built_in", lambda config, file: False)
    done = meanwhile(monkeypatch, lambda: None, times=9)
    for _ in range(2):
        load_spectra(old)
    assert len(done) == 2
