import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import typer
from adapters import lora_config, lora_tensors, write_adapter
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis import cli, commands
from msplora_analysis.commands.shared import terminal

ROOT = Path(ma.__file__).parent.parent


def python(code: str, *args: object, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True, text=True, env=environment, timeout=600, **options,
    )  # fmt: skip


MAIN = "from msplora_analysis.cli import main; main()"


def run(capsys, monkeypatch, *args: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command, in this process."""
    monkeypatch.setattr(sys, "argv", ["msplora-analyze", *map(str, args)])
    monkeypatch.setattr("warnings.showwarning", None)  # main sets it: put it back afterwards
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.fixture
def runs(tmp_path) -> Path:
    for step in range(0, 110, 10):
        tensors = lora_tensors("layer.0.query", "layer.1.query", rank=4, seed=step)
        if step == 0:
            tensors = {name: values * ("lora_A" in name) for name, values in tensors.items()}
        write_adapter(tmp_path / "runs" / "lora" / f"checkpoint-{step}", tensors, lora_config(r=4), epoch=step / 10)
    write_adapter(tmp_path / "runs" / "[plain]", lora_tensors("layer.0.q"))
    return tmp_path / "runs"


# What is imported


LIGHT = "pandas numpy pyarrow rich safetensors"
HEAVY = "torch transformers peft matplotlib seaborn scipy"


def imported(code: str, names: str, *args: object) -> str:
    """Which of ``names`` are imported after ``code``, which may exit."""
    code = f"import sys\ntry: {code}\nfinally: print('IMPORTED', *(n for n in {names.split()} if n in sys.modules))"
    result = python(code, *args)
    assert result.stderr == ""
    return result.stdout.rpartition("IMPORTED")[2].strip()


def test_the_package_and_help_import_nothing_heavy():
    names = f"{HEAVY} {LIGHT} pydantic"
    assert imported("import msplora_analysis", names) == ""
    assert imported("import msplora_analysis.cli", names) == ""
    for command in ([], ["spectra"], ["figures"]):
        assert imported(MAIN, names, *command, "--help") == ""


def test_spectra_imports_neither_torch_nor_plots(runs, tmp_path):
    for options in ([], ["--format", "csv"], ["--workers", 2]):
        names = f"{HEAVY} pandas pydantic rich"
        assert imported(MAIN, names, "spectra", runs, "--out", tmp_path / "out", *options) == ""


def test_spectra_of_a_few_adapters_starts_nothing_of_processes(runs, tmp_path):
    names = "multiprocessing concurrent.futures pyarrow.compute"
    assert imported(MAIN, names, "spectra", runs, "--out", tmp_path / "out") == ""


def test_check_of_one_adapter_imports_no_library_but_numpy(tmp_path):
    adapter = write_adapter(tmp_path / "a", lora_tensors("layer.0.q"))
    names = f"{HEAVY} pandas pyarrow safetensors pydantic rich"
    for options in ([], ["--for", "peft"], ["--json"]):
        assert imported(MAIN, names, "check", adapter, *options) == ""


def test_a_command_that_is_named_is_the_only_one_imported(tmp_path):
    adapter = write_adapter(tmp_path / "a", lora_tensors("layer.0.q"))
    names = " ".join(f"msplora_analysis.commands.{name}" for name in commands.ORDER)
    assert imported(MAIN, names, "check", adapter) == "msplora_analysis.commands.check"
    assert imported(MAIN, names, "--help").split() == names.split()


def test_values_that_typer_itself_must_look_at_are_still_refused(runs, tmp_path, capsys, monkeypatch):
    for option, value in (("--format", "xls"), ("--workers", "0"), ("--workers", "two"), ("--top-k", "-3")):
        status, _, stderr = run(capsys, monkeypatch, "spectra", runs, "--out", tmp_path / "out", option, value)
        assert (status, f"Invalid value for '{option}': " in stderr) == (2, True)  # the rest differs by typer's version


def test_lazy_names():
    assert {"load_spectra", "load_metrics", "read_spectra", "write_figures", "AnalysisError"} <= set(dir(ma))
    with pytest.raises(AttributeError, match="no attribute 'load_spectrum'"):
        ma.load_spectrum  # noqa: B018
    assert issubclass(ma.AnalysisError, ValueError)


# spectra


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_spectra_writes_both_tables(runs, tmp_path, capsys, monkeypatch, suffix):
    out = tmp_path / "new" / "out"
    status, stdout, stderr = run(capsys, monkeypatch, "spectra", runs, "--out", out, "--format", suffix)
    assert (status, stderr) == (0, "")
    assert stdout.endswith(f"\n{out}/spectra.{suffix}\n{out}/metrics.{suffix}\n")
    assert sorted(os.listdir(out)) == [f"metrics.{suffix}", f"spectra.{suffix}"]
    pd.testing.assert_frame_equal(ma.read_spectra(out / f"spectra.{suffix}"), ma.load_spectra(runs))


def test_default_format_is_parquet(runs, tmp_path, capsys, monkeypatch):
    run(capsys, monkeypatch, "spectra", runs / "lora", runs / "[plain]", "--out", tmp_path / "out")
    metrics = pd.read_parquet(tmp_path / "out" / "metrics.parquet")
    assert list(metrics)[-3:] == ["m_eff_1", "m_eff_2", "m_eff_4"]
    pd.testing.assert_frame_equal(metrics, ma.load_metrics(runs))


def test_k_adds_to_the_measures(runs, tmp_path, capsys, monkeypatch):
    run(capsys, monkeypatch, "spectra", runs, "--out", tmp_path, "--format", "csv", "--k", "8", "--k", "3, 16")
    measures = [name for name in pd.read_csv(tmp_path / "metrics.csv") if name.startswith("m_eff")]
    assert measures == ["m_eff_1", "m_eff_2", "m_eff_3", "m_eff_4", "m_eff_8", "m_eff_16"]


def test_summary(runs, tmp_path, capsys, monkeypatch):
    _, stdout, _ = run(capsys, monkeypatch, "spectra", runs, "--out", tmp_path / "out")
    lines = [" ".join(line.split()) for line in stdout.splitlines()]
    assert "[plain]: means over matrices" in lines
    assert "lora: means over matrices" in lines
    assert lines.count("scale epoch matrices sigma_1 rank rank M_eff-1 M_eff-4") == 2
    start = lines.index("lora: means over matrices") + 3
    rows = [line.split() for line in lines[start : start + 11]]
    assert [row[1] for row in rows] == list(map(str, range(11)))
    assert rows[0] == ["layer", "0", "2", "0", "-", "-", "-", "-"]
    means = ma.load_metrics(runs / "lora").query("epoch == 10")
    expected = [f"{means[name].mean():.4g}" for name in ("sigma_1", "effective_rank", "stable_rank", "m_eff_1")]
    assert rows[-1] == ["layer", "10", "2", *expected, "1"]


def test_names_of_a_table_are_wrapped_to_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "34")
    rows = [["encoder.layer.0.attention.self.query", "12"], ["red \x1b[31m", "8"]]
    assert terminal.plain_table(["module", "energy\nkept"], rows).splitlines() == [
        "                            energy",
        "module                        kept",
        "encoder.layer.0.attention.      12",
        "self.query",
        "red \\x1b[31m                     8",
    ]


def test_summary_of_many_checkpoints_is_spread_over_them():
    assert terminal._spread(list(range(101)))[:3] == [0, 9, 18]
    assert terminal._spread(list(range(101)))[-1] == 100


def test_a_path_alone_is_advised_on(runs, capsys, monkeypatch):
    status, stdout, _ = run(capsys, monkeypatch, runs / "lora")
    assert (status, stdout) == (0, run(capsys, monkeypatch, "advise", runs / "lora")[1])
    assert run(capsys, monkeypatch, "runs/nowhere")[0] == 1
    status, _, stderr = run(capsys, monkeypatch, "spectr")
    assert status == 2
    assert "Did you mean 'spectra'" in stderr


def test_underscores_in_options_are_dashes(runs, capsys, monkeypatch):
    assert run(capsys, monkeypatch, "advise", runs / "lora", "--ignore_unknown")[0] == 0


def test_completion_scripts_are_there(monkeypatch):
    monkeypatch.setenv("_MSPLORA_ANALYZE_COMPLETE", "source_bash")
    assert "complete" in python("from msplora_analysis.cli import app; app(prog_name='msplora-analyze')").stdout


def test_ignore_unknown_warns_on_standard_error(tmp_path, capsys, monkeypatch):
    tensors = lora_tensors("layer.0.q") | {"what.weight": lora_tensors("x")["base_model.model.x.lora_A.weight"]}
    folder = write_adapter(tmp_path / "a", tensors)
    status, stdout, stderr = run(capsys, monkeypatch, "spectra", folder, "--out", tmp_path / "out")
    prefix = f"{folder}/adapter_model.safetensors: unknown tensors (1): what.weight"
    assert (status, stdout) == (1, "")
    assert stderr == f"error: {prefix}; pass --ignore-unknown to leave them out\n"
    status, _, stderr = run(capsys, monkeypatch, "spectra", folder, "--out", tmp_path / "out", "--ignore-unknown")
    assert (status, stderr) == (0, f"warning: {prefix} are left out\n")


def test_summary_of_many_runs_is_cut(tmp_path, capsys, monkeypatch):
    for i in range(23):
        write_adapter(tmp_path / "runs" / str(i))
    _, stdout, _ = run(capsys, monkeypatch, "spectra", tmp_path / "runs", "--out", tmp_path / "out")
    assert stdout.count("means over matrices") == 20
    assert "\n... and 3 more runs, in the tables\n" in stdout


# figures


@pytest.mark.slow
def test_figures_of_runs_and_of_tables_are_the_same(runs, tmp_path, capsys, monkeypatch):
    run(capsys, monkeypatch, "spectra", runs, "--out", tmp_path / "tables")
    numbers = []
    for i, path in enumerate((runs, tmp_path / "tables", tmp_path / "tables" / "spectra.parquet")):
        out = tmp_path / "new" / str(i)
        status, stdout, stderr = run(capsys, monkeypatch, "figures", path, "--out", out, "--format", "svg")
        assert (status, stderr) == (0, "")
        assert sorted(stdout.splitlines()) == sorted(map(str, out.iterdir()))
        assert {file.suffix for file in out.iterdir()} == {".csv", ".svg"}
        numbers.append({file.name: file.read_bytes() for file in out.glob("*.csv")})
    assert "m_eff_over_epochs.csv" in numbers[1]
    assert numbers[1] == numbers[2]
    assert numbers[1].items() <= numbers[0].items()  # adapters give figures of pairs too


def test_figures_are_pdf_and_png(tmp_path, capsys, monkeypatch):
    folder = write_adapter(tmp_path / "a", lora_tensors("layer.0.q"))
    status, _, stderr = run(capsys, monkeypatch, "figures", folder, "--out", tmp_path / "out")
    assert (status, stderr) == (0, "")
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".csv", ".pdf", ".png"}


# Exit status


def test_version(capsys, monkeypatch):
    assert run(capsys, monkeypatch, "--version") == (0, f"msplora-analyze {ma.__version__}\n", "")


@pytest.mark.parametrize("command", ["spectra", "figures"])
def test_help_ends_in_examples(capsys, monkeypatch, command):
    status, stdout, _ = run(capsys, monkeypatch, command, "--help")
    assert status == 0
    examples = stdout.split("Examples:\n")[1].split("\n")
    assert examples[-2].startswith(f"    msplora-analyze {command} ")
    assert "--out DIR" in stdout


@pytest.mark.parametrize("command", ["spectra", "figures"])
def test_bad_input_is_one_line_and_status_one(tmp_path, capsys, monkeypatch, command):
    (tmp_path / "empty").mkdir()
    for path, reason in (("nowhere", "no such file or folder"), ("empty", "no adapter found")):
        status, stdout, stderr = run(capsys, monkeypatch, command, tmp_path / path, "--out", tmp_path / "out")
        assert (status, stdout) == (1, "")
        assert stderr.startswith(f"error: {tmp_path / path}: {reason}")
        assert stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["spectra", "figures"])
@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_that_is_no_folder(runs, tmp_path, capsys, monkeypatch, command, out):
    (tmp_path / "file").write_text("")
    result = run(capsys, monkeypatch, command, runs, "--out", tmp_path / out)
    assert result == (1, "", f"error: --out {tmp_path / out}: not a folder; give another path\n")


def test_nothing_to_draw(tmp_path, capsys, monkeypatch):
    folder = write_adapter(tmp_path / "a", lora_tensors("query"))  # of no numbered layer, at one time
    status, stdout, stderr = run(capsys, monkeypatch, "figures", folder, "--out", tmp_path / "out")
    assert (status, stdout) == (1, "")
    assert stderr.startswith("error: nothing to draw")
    assert "checkpoints" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ["spectra", "x"],
        ["spectra", "--out", "o"],
        ["spectra", "x", "--out", "o", "--format", "xlsx"],
        ["spectra", "x", "--out", "o", "--k", "0"],
        ["spectra", "x", "--out", "o", "--k", "one"],
        ["spectra", "x", "--out", "o", "--k", "1,,2"],
        ["figures", "x", "--out", "o", "--format", "bmp"],
        ["draw"],
    ],
)
def test_wrong_usage_is_status_two(tmp_path, capsys, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = run(capsys, monkeypatch, *args)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("Usage: msplora-analyze ")
    assert os.listdir(tmp_path) == []


def test_interrupt_is_status_130(runs, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("msplora_analysis.tables.gather.read_tables", interrupt)
    assert run(capsys, monkeypatch, "figures", runs, "--out", tmp_path / "out") == (130, "", "")


def test_reader_that_goes_away_is_no_failure(runs, tmp_path):
    code = f"import os; read, write = os.pipe(); os.dup2(write, 1); os.close(read); os.close(write)\n{MAIN}"
    result = python(code, "spectra", runs, "--out", tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    assert len(os.listdir(tmp_path / "out")) == 2


def test_reference_run_through_the_command(reference, tmp_path):
    result = python(MAIN, "spectra", reference / "minilm_cola_lora_epoch20", "--out", tmp_path, "--format", "csv")
    assert (result.returncode, result.stderr) == (0, "")
    table = pd.read_csv(tmp_path / "spectra.csv").merge(
        pd.read_csv(reference / "minilm_cola_lora_epoch20" / "expected.csv"), on=["name", "k"], suffixes=("", "_exact")
    )
    assert len(table) == 96
    assert (table["sigma"] / table["sigma_exact"] - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("message", "arguments", "expected"),
    [
        ("dtype=int8: expected float32", ["dtype"], "--dtype int8: expected float32"),
        ("give a larger top_k=", ["top_k"], "give a larger --top-k"),
        ("x: pass ignore_unknown=True to go on", ["ignore_unknown"], "x: pass --ignore-unknown to go on"),
        ("give energy=, rank= or budget=64", ["energy", "rank", "budget"], "give --energy, --rank or --budget 64"),
        ("runs/rank=8/seed=1: no adapter", [], "runs/rank=8/seed=1: no adapter"),
        ("runs/rank=8: give rank=4", ["rank"], "runs/rank=8: give --rank 4"),
        ("none of base=../model; give base=.", ["base"], "none of --base ../model; give --base."),
    ],
)
def test_a_message_speaks_of_options_on_the_command_line(message, arguments, expected):
    error = ma.AnalysisError(message, *arguments)
    assert (str(error), cli.with_options(error)) == (message, expected)
    assert pickle.loads(pickle.dumps(error)).arguments == tuple(arguments)  # from a worker process


TOY = '''
import typer
from msplora_analysis.commands.shared.declaring import command

@command("Say hello.", examples=("msplora-analyze toy anna", "msplora-analyze toy anna --loud"))
def toy(name: str, loud: bool = False) -> None:
    """Say hello to somebody."""
    print(f"hello {name}{'!' if loud else ''}")
'''


def test_a_new_command_is_one_file(tmp_path, monkeypatch):
    assert [found.name for found in typer.main.get_command(cli.app).commands.values()] == [*commands.ORDER]
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    app, invoke = cli.make_app(), CliRunner().invoke
    assert invoke(app, ["toy", "anna", "--loud"]).output == "hello anna!\n"
    assert invoke(app, ["toy", "--help"]).output.endswith(
        "Examples:\n\n    msplora-analyze toy anna\n    msplora-analyze toy anna --loud\n"
    )
    listed = re.findall(r"^  ([a-z]\w*)  ", invoke(app, ["--help"]).output.partition("Commands:")[2], re.MULTILINE)
    assert listed == [*commands.ORDER, "toy"]
