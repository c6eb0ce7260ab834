"""``import msplora_analysis as ma``, as somebody in a notebook meets it."""

import ast
import doctest
import inspect
import pickle
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from adapters import write_adapter
from figure_cases import ablation_of

import msplora_analysis as ma
from msplora_analysis.ask.comparison.statements import sentences
from msplora_analysis.ask.findings import KINDS
from msplora_analysis.ask.findings.base import COLUMNS
from msplora_analysis.show.drawing.figure import Figure, Figures
from msplora_analysis.show.notebook import Ablation, Comparison, Findings
from msplora_analysis.tables.pairs import load_redundancy

RUNS = Path(__file__).parents[2] / "examples" / "runs"
LORA, MSPLORA = RUNS / "lora-8", RUNS / "msplora-8-8-8"
HEAVY = ("numpy", "pandas", "torch", "matplotlib", "scipy", "seaborn", "pyarrow", "typer", "rich", "peft")


@pytest.fixture(scope="module")
def spectra() -> pd.DataFrame:
    table = ma.load_spectra(RUNS)
    return table[table["step"].isin([0, 270])]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return ma.compare([MSPLORA / "checkpoint-270"], LORA / "checkpoint-270")


class Text(HTMLParser):
    """The tags of HTML, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.rows = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.rows += tag == "tr"

    def handle_data(self, data: str) -> None:
        self.text += data


def finding(**values: Any) -> dict[str, Any]:
    known = {"id": "rank-unused", "severity": "info", "run": "run", "scale": "layer", "group": 3, "module": "query"}
    return {**dict.fromkeys(COLUMNS), **known, "evidence": "seen", "source": "ours", "advice": "try less", **values}


def as_findings(*rows: dict[str, Any]) -> Findings:
    return Findings(pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS))


# names


def test_importing_it_imports_nothing_heavy() -> None:
    code = f"import sys, msplora_analysis as ma; dir(ma); print(*(m for m in {HEAVY} if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_type_checkers_see_what_python_loads() -> None:
    tree = ast.parse(Path(ma.__file__).read_text(encoding="utf-8"))
    seen = {}
    for block in (node for node in tree.body if isinstance(node, ast.If)):
        for line in block.body:
            assert isinstance(line, ast.ImportFrom)
            for name in line.names:
                assert name.asname == name.name  # a public name, to a type checker
                seen[name.name] = str(line.module).removeprefix("msplora_analysis.")
    assert seen == ma._MODULES


def test_tab_completion_offers_the_public_names_alone() -> None:
    completer = pytest.importorskip("IPython.core.completer")
    for use_jedi in (False, True):
        complete = completer.IPCompleter(namespace={"ma": ma}, use_jedi=use_jedi)
        with completer.provisionalcompleter():
            offered = {c.text.lstrip(".").removeprefix("ma.") for c in complete.completions("ma.", 3)}
        assert {name for name in offered if not name.startswith("_")} == set(ma.__all__) - {"__version__"}
    assert dir(ma) == sorted(ma.__all__)


@pytest.mark.parametrize("name", sorted(ma._MODULES))
def test_every_name_is_there_with_signature_and_docstring(name: str) -> None:
    if name == "SpectraCallback":
        pytest.importorskip("transformers")
    value = getattr(ma, name)
    assert value is getattr(ma, name)
    assert not inspect.ismodule(value)
    assert len(inspect.getdoc(value) or "") > 40
    if inspect.isfunction(value):
        assert next(iter(inspect.signature(value).parameters)) not in ("args", "kwargs")


def test_help_before_first_use_is_that_of_the_function() -> None:
    code = "import msplora_analysis as ma, inspect; print(inspect.signature(ma.diagnose), inspect.getdoc(ma.diagnose))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("(source:")
    assert "What deserves a look" in shown


# verbs


# What needs more than the example runs have.
NOT_RUN = {
    "compress": "needs moments",
    "load_moments": "needs moments",
    "export": "needs a base model",
    "extract": "needs a base model",
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what docstrings speak of."""
    folder = tmp_path_factory.mktemp("examples")
    copies = {"runs/cola": LORA, "runs/lora": LORA, "runs/msplora": MSPLORA, "examples/runs": RUNS}
    last = {"adapter": LORA, "style": LORA, "subject": MSPLORA}
    for name, source in copies.items() | {name: run / "checkpoint-270" for name, run in last.items()}.items():
        shutil.copytree(source, folder / name)
    ablation_of(4).to_csv(folder / "runs/cola/ablation.csv", index=False)
    key = "base_model.model.layer.0.q.lora"
    parts = {f"{key}_A.weight": np.ones((2, 6)), **{f"{key}_B{i}.weight": np.eye(5, 2) + i for i in range(2)}}
    write_adapter(folder / "hydra", parts)
    (folder / "tables").mkdir()
    ma.load_spectra(LORA).to_parquet(folder / "tables/spectra.parquet", index=False)
    return folder


DRAWN = ("report", "write_figures")  # which takes long
RUN = sorted({*ma.__all__} - {"AnalysisError", "__version__"} - NOT_RUN.keys())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in DRAWN else []) for name in RUN]
)
def test_the_example_of_a_docstring_runs(name: str, examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "SpectraCallback":
        pytest.importorskip("transformers")
    monkeypatch.chdir(examples)
    lines = doctest.DocTestParser().get_examples(getattr(ma, name).__doc__)
    assert lines
    names = {"ma": ma}
    for line in lines:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                value = eval(line.source, names)
            except SyntaxError:  # an assignment
                exec(line.source, names)
        if line.want:
            assert repr(value) == line.want.strip()


# tables


def test_totals_and_parts_are_never_mixed() -> None:
    metrics = ma.load_metrics(RUNS)
    whole, trained = ma.totals(metrics), ma.parts(metrics)
    assert set(whole.loc[whole["run"] == "msplora-8-8-8", "scale"]) == {"total"}
    assert set(whole.loc[whole["run"] == "lora-8", "scale"]) == {"layer"}
    assert whole.groupby(["run", "step"]).size().unique().tolist() == [12]  # 6 layers of 2 modules, in either method
    assert set(trained["scale"]) == {"global", "mid", "layer"}
    assert len(trained) == (metrics["scale"] != "total").sum()
    with pytest.raises(ma.AnalysisError, match="no column scale"):
        ma.parts(metrics[["run"]])


def test_diagnose_takes_a_path_a_list_or_the_tables(spectra: pd.DataFrame) -> None:
    last = [run / "checkpoint-270" for run in (LORA, MSPLORA)]
    expected = ma.diagnose(last)
    assert len(expected)
    assert set(ma.diagnose(str(last[0]))["run"]) == {"lora-8"}
    tables, both = ma.load_tables(last), load_redundancy(last, details=True)
    found = ma.diagnose(tables.spectra, tables.metrics, both.pairs, scales=both.scales)
    pd.testing.assert_frame_equal(found, expected)
    assert isinstance(ma.diagnose(spectra), Findings)


def test_compare_takes_paths_or_tables(spectra: pd.DataFrame, comparison: Comparison) -> None:
    pairs = ma.load_pairs([MSPLORA / "checkpoint-270", LORA / "checkpoint-270"], details=True)
    of_tables = ma.compare(spectra, spectra, method_a="MSPLoRA 8/8/8", method_b="LoRA r=8", pairs=pairs)
    assert set(of_tables["measure"]) == {"kl", "kl_matched", "js", "overlap_in", "overlap_out"}
    told = ["paired", "resampled"]  # run.json tells task and seed; the names of these runs do not
    pd.testing.assert_frame_equal(
        pd.DataFrame(of_tables.drop(columns=told)), pd.DataFrame(comparison.drop(columns=told))
    )
    assert comparison.sentences == list(sentences(comparison))


def test_two_tables_of_one_method_are_told_apart(spectra: pd.DataFrame) -> None:
    lora = spectra[spectra["run"] == "lora-8"]
    doubled = lora.assign(sigma=lora["sigma"] * 2, run="other")
    found = ma.compare(lora, doubled)
    assert (found["a"][0], found["b"][0]) == ("LoRA r=8 (a)", "LoRA r=8 (b)")
    differences = found[found["question"] == "difference"]
    np.testing.assert_allclose(differences["estimate"], 0, atol=1e-12)  # of normalised spectra


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: ma.diagnose([]), "no path is given; expected a path"),
        (lambda t: ma.diagnose(None), "NoneType is given; expected a path"),
        (lambda t: ma.diagnose([t]), "DataFrame is given; expected a path"),
        (lambda t: ma.compare(LORA, 3), "int is given; expected a path"),
        (lambda t: ma.diagnose(LORA, t), "belong to a spectra table"),
        (lambda t: ma.diagnose(t, base="model"), "base is for reading adapters"),
        (lambda t: ma.diagnose(t, cache=False), "cache is for reading adapters"),
        (lambda t: ma.diagnose(t.drop(columns="sigma")), "lacks the column sigma"),
        (lambda t: ma.compare(t, LORA), "both methods as paths, or both as spectra tables"),
        (lambda t: ma.compare(t, t), "LoRA r=8, MSPLoRA 8/8/8"),
        (lambda t: ma.compare(t, t, method_a="DoRA"), "'DoRA'"),
        (lambda t: ma.compare(t, t, workers=2), "workers is for reading adapters"),
        (lambda t: ma.load_spectra(LORA, semantics="papers"), "semantics='papers': expected paper or as-executed"),
        (lambda t: ma.compare(LORA, LORA, pairs=t), "pairs belong to spectra tables"),
    ],
)
def test_bad_input_is_one_clear_line(spectra: pd.DataFrame, call: Any, message: str) -> None:
    with pytest.raises(ma.AnalysisError, match=message) as caught:
        call(spectra)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("load_spectra", "load_metrics", "load_tables", "load_pairs", "load_scale_pairs", "load_redundancy"),
        *("diagnose", "compare", "report", "draw_figures"),
    ],
)
def test_a_wrong_keyword_is_pythons_own_error(name: str) -> None:
    paths = [LORA, LORA] if name == "compare" else [LORA]
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'worker'"):
        getattr(ma, name)(*paths, worker=1)


# display


def test_findings_show_each_kind_once_with_its_first_places() -> None:
    faults = [finding(id="no-update", severity="error", run="broken", evidence="all zero")]
    unused = [finding(group=i, epoch=6, evidence=f"place {i}") for i in range(5)]
    shown = Text(as_findings(*faults, *unused)._repr_html_() or "")
    assert shown.rows == 3  # a head, and two kinds
    assert shown.text.index("all zero") < shown.text.index("place 0")
    assert KINDS["no-update"].title in shown.text
    assert "run, epoch 6, layer 2 query: place 2and 2 more" in shown.text
    assert "place 3" not in shown.text
    assert shown.text.endswith("1 error, 5 info")
    assert Text(as_findings()._repr_html_() or "").text == "no findings"


def test_findings_are_read_in_a_terminal() -> None:
    shown = repr(as_findings(finding(severity="error", id="no-update"), *(finding(group=i) for i in range(5))))
    assert shown.splitlines() == [
        f"✖ error no-update: {KINDS['no-update'].title}",
        "    run, layer 3 query: seen",
        "  try: try less",
        f"ℹ info rank-unused: {KINDS['rank-unused'].title}",
        *(f"    run, layer {i} query: seen" for i in range(3)),
        "    and 2 more",
        "  try: try less",
        "1 error, 5 info",
    ]
    assert repr(as_findings()) == "no findings"
    assert "\x1b" not in repr(as_findings(finding(run="\x1b[2J")))
    assert "evidence" in repr(as_findings(finding())[["run", "evidence"]])  # as pandas shows it


def test_names_from_files_are_text_wherever_they_stand(comparison: Comparison) -> None:
    evil = "<script>alert(1)</script> $x$ \u202e\x1b[0m"
    columns = ("id", "run", "module", "evidence", "source", "advice")
    html = as_findings(finding(**dict.fromkeys(columns, evil)))._repr_html_() or ""
    compared = comparison.assign(a=evil, measure="kl")
    for shown in (html, compared._repr_html_() or "", Figures({evil: empty_figure()})._repr_html_()):
        page = Text(shown)
        assert "script" not in page.tags
        assert "<script>alert(1)</script>" in page.text
        assert shown.isprintable()
    assert "mathjax_ignore" in html  # or it would set $x$ as a formula


def empty_figure() -> Figure:
    return Figure(figsize=(1, 1))


def test_a_comparison_shows_sentences_and_numbers(comparison: Comparison) -> None:
    shown = Text(comparison._repr_html_() or "")
    assert all(sentence in shown.text for sentence in comparison.sentences)
    differences = comparison[comparison["question"] == "difference"]
    assert isinstance(differences, Comparison)
    assert shown.rows == 1 + len(differences)
    assert "too few runs" in shown.text  # one of each
    only_tests = comparison[comparison["question"] != "difference"]
    assert Text(only_tests._repr_html_() or "").rows == 0


def test_a_comparison_is_read_in_a_terminal(comparison: Comparison) -> None:
    shown = repr(comparison)
    assert " ".join(shown.split("\n\n")[0].split()) == comparison.verdict
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "A − B" in shown
    assert "details" not in repr(comparison.head(1))


def test_an_interval_is_shown_with_its_decision(comparison: Comparison) -> None:
    known = comparison.head(1).assign(low=-0.5, high=0.25, decided=False)
    assert "-0.5 to +0.25no" in Text(known._repr_html_() or "").text
    assert "+0.1 to +0.25yes" in Text(known.assign(low=0.1, decided=True)._repr_html_() or "").text


def test_advice_shows_its_answers_and_the_table_of_ranks() -> None:
    advice = ma.advise(RUNS, cache=False)
    shown = Text(advice._repr_html_())
    assert shown.rows == sum(1 + len(one.ranks) for one in advice)
    for one in advice:
        assert all(f"{answer.question} {answer.answer}" in shown.text for answer in one.answers)
    assert "its head was not saved" in shown.text
    assert "What rank does it use? Weights alone do not tell." in repr(advice)


def test_an_ablation_shows_the_cuts_that_cost_most() -> None:
    ablation = Ablation(ablation_of(4))  # 8 modules; later layers cost more
    shown = Text(ablation._repr_html_() or "")
    assert "matthews correlation 0.5 with all of it" in shown.text
    assert "layer.3.self.value" in shown.text
    assert "layer.0.self.query" not in shown.text
    assert "and 2 more that cost less" in shown.text
    assert shown.text.index("rankevery module to rank 1") < shown.text.index("rankevery module to rank 4")
    assert Text(ablation[ablation["cut"] == "layer"]._repr_html_() or "").rows == 1 + 4
    assert "b" in shown.tags  # a change beyond chance
    sure = ablation["high"] < 0
    assert "<b>" not in (ablation[~sure & (ablation["cut"] != "none")]._repr_html_() or "")


def test_a_table_stays_a_table() -> None:
    table = as_findings(finding(), finding(group=4), finding(severity="error", id="no-update"))
    assert isinstance(table[table["severity"] == "info"], Findings)
    assert "dataframe" in (table[["run", "evidence"]]._repr_html_() or "")  # what pandas shows
    assert type(table["run"]) is pd.Series
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(table)), table)
    assert isinstance(pd.concat([table, table], ignore_index=True), Findings)


def test_figures_show_themselves_with_their_names() -> None:
    figures = ma.draw_figures(ma.load_spectra(LORA / "checkpoint-270"))
    assert len(figures) > 1
    html = figures._repr_html_()  # type: ignore[attr-defined]
    assert html.count("data:image/png;base64,iVBOR") == len(figures)
    assert all(name in html for name in figures)


def test_jupyter_shows_a_figure_without_a_change_to_its_settings() -> None:
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    formatters = shell.display_formatter.formatters["image/png"]
    before = dict(formatters.type_printers)
    figure = empty_figure()
    data, metadata = shell.display_formatter.format(figure)
    assert data["image/png"].startswith(b"\x89PNG")
    assert metadata["image/png"] == {"width": 100, "height": 100}
    assert "text/html" in shell.display_formatter.format(Figures(one=figure))[0]
    assert dict(formatters.type_printers) == before


def test_tables_alone_cannot_be_compared_with_a_base(spectra: pd.DataFrame, tmp_path: Path) -> None:
    spectra.to_parquet(tmp_path / "spectra.parquet")
    with pytest.raises(ma.AnalysisError, match=r"base=model: .*spectra\.parquet is a table"):
        ma.diagnose(tmp_path / "spectra.parquet", base="model")
