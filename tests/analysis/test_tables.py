import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from adapters import lora_config, lora_tensors, write_adapter

import msplora_analysis as ma
from msplora_analysis import AnalysisError
from msplora_analysis.options import Execution, Options
from msplora_analysis.tables.files import write_table
from msplora_analysis.tables.gather import gather_spectra
from msplora_analysis.tables.load import load_tables

KEYS = ["run", "step", "epoch", "scale", "group", "module", "name"]
METRICS = [
    *KEYS, "rows", "cols", "rank", "sigma_1", "frobenius", "nuclear", "stable_rank", "effective_rank",
    "participation_ratio",
]  # fmt: skip


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two runs: one of checkpoints, one without steps; one module outside the numbered layers."""
    for step, epoch in ((0, 0), (10, 1), (20, 2)):
        tensors = lora_tensors("layer.0.query", "layer.10.query", "layer.9.query", "pooler.dense", seed=step)
        write_adapter(tmp_path / "runs" / "NA" / f"checkpoint-{step}", tensors, epoch=epoch)
    write_adapter(tmp_path / "runs" / "plain", lora_tensors("h.0.q", rank=3), lora_config(r=3))
    return tmp_path / "runs"


def test_columns_and_types(runs):
    spectra, metrics = load_tables(runs)
    assert list(spectra) == [*KEYS, "k", "sigma"]
    assert list(metrics) == [*METRICS, "m_eff_1", "m_eff_2", "m_eff_4"]
    for table in (spectra, metrics):
        types = table.dtypes
        assert all(pd.api.types.is_string_dtype(types[name]) for name in ("run", "scale", "module", "name"))
        assert (types["step"], types["epoch"], types["group"]) == ("Int64", "Int64", "Int64")
        assert table.index.equals(pd.RangeIndex(len(table)))
    assert (spectra.dtypes["k"], spectra.dtypes["sigma"]) == ("int64", "float64")
    assert (metrics.dtypes[["rows", "cols", "rank"]] == "int64").all()
    assert (metrics.dtypes.iloc[10:] == "float64").all()


def test_rows(runs):
    spectra, metrics = load_tables(runs)
    assert len(spectra) == 3 * 4 * 2 + 3
    assert len(metrics) == 3 * 4 + 1
    assert metrics["run"].tolist() == ["NA"] * 12 + ["plain"]
    assert metrics["name"].tolist()[:4] == ["layer.0.query", "layer.9.query", "layer.10.query", "pooler.dense"]
    assert metrics["group"].tolist()[:3] == [0, 9, 10]
    assert metrics["group"].isna().tolist()[:4] == [False, False, False, True]
    assert metrics["step"].isna().tolist() == [False] * 12 + [True]
    assert (metrics["rows"] == 5).all()
    assert (metrics["cols"] == 6).all()
    last = spectra[spectra["run"] == "plain"]
    assert last["k"].tolist() == [1, 2, 3]
    assert last["epoch"].isna().all()


def test_spectra_and_metrics_agree(runs):
    spectra, metrics = load_tables(runs, ks=(1, 3))
    assert list(metrics)[-2:] == ["m_eff_1", "m_eff_3"]
    for (_, row), (_, sigma) in zip(
        metrics.iterrows(), spectra.groupby(KEYS, dropna=False, sort=False)["sigma"], strict=True
    ):
        values = sigma.to_numpy()
        assert row["rank"] == len(values)
        assert (np.diff(values) <= 0).all()
        assert row["sigma_1"] == values[0]
        assert row["nuclear"] == pytest.approx(values.sum())
        assert row["m_eff_1"] == pytest.approx(values[0] / values.sum())
        assert row["m_eff_3"] == 1


def test_load_functions_of_the_package(runs):
    spectra, metrics = load_tables(runs, ks=(1, 8))
    pd.testing.assert_frame_equal(ma.load_spectra(str(runs)), spectra)
    pd.testing.assert_frame_equal(ma.load_spectra([runs / "NA", runs / "plain"]), spectra)
    pd.testing.assert_frame_equal(ma.load_metrics(runs, ks=(1, 8)), metrics)


def test_fractional_epochs_make_the_column_float(tmp_path):
    write_adapter(tmp_path / "run" / "checkpoint-1", epoch=0.5)
    write_adapter(tmp_path / "run" / "checkpoint-2", epoch=1)
    epochs = ma.load_spectra(tmp_path)["epoch"]
    assert epochs.dtype == "Float64"
    assert epochs.unique().tolist() == [0.5, 1.0]


def test_progress_is_told(runs):
    calls = []
    load_tables(runs, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_what_is_written_reads_back_the_same(runs, tmp_path, suffix):
    spectra = load_tables(runs).spectra
    file = tmp_path / f"spectra.{suffix}"
    write_table(spectra, file)
    pd.testing.assert_frame_equal(ma.read_spectra(file), spectra)
    assert os.listdir(tmp_path) == ["runs", file.name] or os.listdir(tmp_path) == [file.name, "runs"]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_equal_tables_are_equal_files(runs, tmp_path, suffix):
    for name in ("a", "b"):
        write_table(load_tables(runs).metrics, tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_parquet_tells_the_version_and_no_path(runs, tmp_path):
    write_table(load_tables(runs).spectra, tmp_path / "t.parquet")
    metadata = pq.read_schema(tmp_path / "t.parquet").metadata
    assert metadata[b"msplora_analysis"] == ma.__version__.encode()
    assert str(tmp_path).encode() not in (tmp_path / "t.parquet").read_bytes()


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    file = tmp_path / f"spectra.{suffix}"
    file.write_text("old")
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most[1]))  # as a disk that is full soon
    try:
        with pytest.raises(AnalysisError, match="cannot be written: ") as caught:
            write_table(pd.DataFrame({"a": np.random.default_rng(0).random(10_000)}), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert str(caught.value).startswith(f"{file}: ")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == [file.name]


def read_error(path) -> str:
    with pytest.raises(AnalysisError) as caught:
        ma.read_spectra(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tables_that_are_no_spectra(tmp_path, runs):
    spectra, metrics = load_tables(runs)
    write_table(metrics, tmp_path / "metrics.csv")
    assert read_error(tmp_path / "metrics.csv") == (
        f"{tmp_path}/metrics.csv: not a spectra table: no column k, sigma; expected spectra.parquet or spectra.csv of "
        "`msplora-analyze spectra`"
    )
    for name in ("bad.parquet", "bad.csv", "empty.csv"):
        (tmp_path / name).write_bytes(b"" if name == "empty.csv" else b'"\x00\xff\n')
        assert read_error(tmp_path / name).startswith(f"{tmp_path / name}: cannot be read as a table: ")
    assert read_error(tmp_path / "no.csv") == f"{tmp_path}/no.csv: no such file"
    assert read_error(tmp_path / "t.txt") == f"{tmp_path}/t.txt: not a table; expected a .parquet or .csv file"
    gaps = "the table has no rows, or no run, scale, module, name, sigma in some"
    write_table(spectra.iloc[:0], tmp_path / "none.parquet")
    assert read_error(tmp_path / "none.parquet") == f"{tmp_path}/none.parquet: {gaps}"
    write_table(spectra.assign(sigma=np.nan), tmp_path / "gaps.csv")
    assert read_error(tmp_path / "gaps.csv") == f"{tmp_path}/gaps.csv: {gaps}"
    write_table(spectra.assign(sigma=-1.0), tmp_path / "negative.csv")
    assert read_error(tmp_path / "negative.csv").endswith("sigma must be at least 0 and k at least 1")
    write_table(spectra.assign(scale="other"), tmp_path / "scale.csv")
    assert read_error(tmp_path / "scale.csv").endswith("scale must be one of global, mid, layer, total, got 'other'")
    (tmp_path / "twice.csv").write_text("run,k,run\na,1,b\n")
    twice = "column run occurs twice|non-unique column"  # pandas 2 says the latter
    assert re.search(twice, read_error(tmp_path / "twice.csv"))
    for name, start in (("text.csv", "cannot be read as a table"), ("text.parquet", "a column is not of its type")):
        write_table(spectra.astype({"step": object}).assign(step="ten"), tmp_path / name)
        assert read_error(tmp_path / name).startswith(f"{tmp_path / name}: {start}: ")


def gathered(paths: list[Path]) -> pd.DataFrame:
    return gather_spectra(paths, Options(), Execution())


def test_tables_and_adapters_in_one(runs, tmp_path):
    spectra = load_tables(runs).spectra
    for folder, run in (("a", "NA"), ("b", "plain")):
        (tmp_path / folder).mkdir()
        write_table(spectra[spectra["run"] == run], tmp_path / folder / "spectra.parquet")
    pd.testing.assert_frame_equal(gathered([tmp_path / "a", tmp_path / "b" / "spectra.parquet"]), spectra)
    pd.testing.assert_frame_equal(gathered([tmp_path / "a", runs / "plain"]), spectra)
    pd.testing.assert_frame_equal(gathered([tmp_path / "a", tmp_path / "a", runs / "plain"]), spectra)
    pd.testing.assert_frame_equal(gathered([runs]), spectra)


def test_a_run_in_two_tables_is_an_error(runs, tmp_path):
    (tmp_path / "a").mkdir()
    write_table(load_tables(runs).spectra, tmp_path / "a" / "spectra.csv")
    with pytest.raises(AnalysisError) as caught:
        gathered([tmp_path / "a", runs / "plain"])
    assert str(caught.value) == (
        f"{runs}/plain: run plain is also in {tmp_path}/a/spectra.csv; give the run folders together instead, "
        "so that each gets its own name"
    )
