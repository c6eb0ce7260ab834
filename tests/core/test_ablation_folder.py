"""``msplora-measure ablate``: the table of a trained run, a second call that goes on, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from msplora_core.measure import cli
from msplora_core.measure.ablation_folder import ablate_to
from msplora_core.measure.loading import load_subject
from msplora_core.measure.recording import record_moments
from msplora_core.train.training import train

from .toys import toy_settings


def trained(folder, **options):
    train(toy_settings(folder, epochs=1, **options), report=lambda line: None)
    checkpoint = max((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return checkpoint, json.loads((folder / "run" / "run.json").read_text())["results"][-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("cola"))


def test_the_whole_adapter_is_as_training_reported_it_and_moments_beside_it_are_used(run, tmp_path):
    checkpoint, result = run
    subject = load_subject(checkpoint)
    moments = record_moments(subject.model, subject.batches("train")).save(checkpoint / "moments.safetensors")
    path = ablate_to(tmp_path, subject, ranks=(1, 2), format="csv", batch_size=4)
    table = pd.read_csv(path)
    assert list(table.columns[:10]) == [
        "cut", "what", "rank", "parameters", "metric", "metric_change", "low", "high", "kl", "predicted_kl",
    ]  # fmt: skip
    np.testing.assert_allclose(table["metric"][0], result["metric"], atol=1e-9)
    np.testing.assert_allclose(table["loss"][0], result["validation_loss"], rtol=1e-5)
    assert (table["cut"] == "rank_task").sum() == 2
    assert table["predicted_kl"].notna().all()
    about = json.loads((tmp_path / "ablation.json").read_text())
    assert (about["run"], about["task"], about["metric"]) == ("run", "cola", "matthews_correlation")
    assert about["step"] == int(checkpoint.name.split("-")[1])
    assert about["examples"] == 19
    moments.unlink()


def test_of_a_language_model_the_metric_is_its_perplexity(tmp_path):
    checkpoint, result = trained(tmp_path, kind="llama", task="alpaca", method="lora", rank=2, max_length=64)
    table = pd.read_parquet(ablate_to(tmp_path / "out", load_subject(checkpoint), ranks=(1,)))
    np.testing.assert_allclose(table["metric"][0], result["metric"], rtol=1e-5)
    np.testing.assert_allclose(table["loss"][0], result["validation_loss"], rtol=1e-5)
    same = table["cut"].isin(["none", "only_scale"])  # LoRA has one scale alone
    assert ((table["kl"] > 0) == ~same).all()


class Stopped(Exception):
    pass


def call(run, out, stop_at=None):
    """The lines said, the passes begun with, and the table if it came so far."""
    said, seen = [], []

    def progress(done, total):
        seen.append(done)
        if stop_at is not None and done >= stop_at * total:
            raise Stopped

    try:
        path = ablate_to(out, load_subject(run[0]), ranks=(1,), batch_size=4, say=said.append, progress=progress)
    except Stopped:
        assert not list(out.glob("ablation.parquet"))
        return said, seen[0], None
    return said, seen[0], pd.read_parquet(path)


def test_a_second_call_goes_on_where_the_first_was_stopped(run, tmp_path):
    assert call(run, tmp_path / "stopped", stop_at=0.5)[:2] == ([], 0)
    said, first, table = call(run, tmp_path / "stopped")
    assert first > 0
    assert "2 of 5 batches" in said[0]
    pd.testing.assert_frame_equal(table, call(run, tmp_path / "fresh")[2])
    said, first, again = call(run, tmp_path / "stopped")
    assert "5 of 5 batches" in said[0]
    pd.testing.assert_frame_equal(table, again)


def test_another_measurement_starts_anew_and_says_why(run, tmp_path):
    call(run, tmp_path)
    said = []
    subject = load_subject(run[0])
    ablate_to(tmp_path, subject, ranks=(1, 2), batch_size=4, say=said.append)
    assert "ranks changed" in said.pop()
    rows = subject.splits["validation"].rows
    rows[0]["label"] = 1 - rows[0]["label"]
    ablate_to(tmp_path, subject, ranks=(1, 2), batch_size=4, say=said.append)
    assert "data changed" in said.pop()
    (tmp_path / "ablation.npz").write_bytes(b"PK\x03\x04 cut off")
    ablate_to(tmp_path, subject, ranks=(1, 2), batch_size=4, say=said.append)
    assert "cannot be read" in said.pop()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ranks", "1,x"], "--ranks=1,x"),
        (["--ranks", "0"], "--ranks=0"),
        (["--format", "xml"], "--format=xml"),
        (["--out", __file__], f"--out={__file__}"),
        (["--task", "colla"], "unknown task 'colla'"),
    ],
)
def test_wrong_options_are_told_in_one_line(run, tmp_path, monkeypatch, capsys, arguments, told):
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["msplora-measure", "ablate", str(run[0]), *out, *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert told in error
    assert not (tmp_path / "out").exists()


def test_the_command_prints_where_the_table_is(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["msplora-measure", "ablate", str(run[0]), "--out", str(tmp_path), "--ranks", "1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip().endswith("ablation.parquet")


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
@pytest.mark.parametrize("command", ["moments", "ablate"])
def test_a_really_full_disk(run, small_disk, monkeypatch, capsys, command):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**16 - 2**13))
    out = small_disk / "out"
    few = ["--examples", "5"] if command == "moments" else ["--ranks", "1"]
    monkeypatch.setattr(sys, "argv", ["msplora-measure", command, str(run[0]), "--out", str(out), *few])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err.splitlines()[-1]  # in this process the libraries may show their bars
    assert stop.value.code == 1
    assert error.startswith("error: ")
    assert str(out) in error
    assert "No space left on device" in error
    assert [path for path in small_disk.rglob("*") if path.is_file()] == [filler]


@pytest.mark.parametrize("spoiled", ["a zip of a later version", "lists in each other"])
def test_what_nobody_wrote_is_measured_anew(tmp_path: Path, spoiled: str) -> None:
    from msplora_core.measure.ablation_folder import _known

    file, said = tmp_path / "ablation.npz", list[str]()
    np.savez(file, about=np.array("[" * 5000 if spoiled.startswith("lists") else "{}"))
    if spoiled.startswith("a zip"):
        content = file.read_bytes()
        at = content.index(b"PK\x01\x02") + 6
        file.write_bytes(content[:at] + b"\xc6" + content[at + 1 :])
    assert _known(file, {"data": {}}, 1, said.append) == []
    assert [line.startswith(f"{file}: cannot be read") for line in said] == [True]
