"""The page of `report`: its numbers against the tables, its names escaped, its file whole."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from adapters import lora_config, lora_tensors, write_adapter
from reports import HOSTILE, write_hostile, write_lora, write_msplora
from safetensors.numpy import load_file
from test_cli import run

import msplora_analysis as ma
from msplora_analysis.compute.measures.rank_needed import energy_rank
from msplora_analysis.show.drawing.colours import ON_SCREEN
from msplora_analysis.show.report import numbers

STYLE = Path(numbers.__file__).with_name("style.css").read_text()


class Page(HTMLParser):
    """A report as a browser parses it: its elements, the text of each script, and all text that is seen."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)
        self.close()
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("report") / "runs"
    write_lora(root / "lora", 2)
    write_msplora(root / "msplora", 3, layers=3)
    return root


@pytest.fixture(scope="module")
def page(runs) -> Page:
    return read(ma.report(runs, runs.parent / "report.html"))


def test_it_is_one_page_that_asks_for_nothing(page):
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert "2 runs compared" in page.text
    loading = [value for _, attrs in page.elements for name, value in attrs.items() if name in ("src", "href")]
    assert loading
    assert all(value.startswith(("#", "data:")) for value in loading)
    assert "@import" not in STYLE
    assert "url(" not in STYLE


def test_links_within_the_page_and_labels_lead_somewhere(page):
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [a["href"].removeprefix("#") for a in page.all("a") if "download" not in a]
    targets += [label["for"] for label in page.all("label")]
    targets += [attrs["aria-labelledby"] for _, attrs in page.elements if "aria-labelledby" in attrs]
    assert len(targets) > 20
    assert set(targets) <= set(ids)


def test_the_policy_allows_the_two_scripts_and_no_other(page):
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts[1:]]
    assert len(digests) == 2
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert rules["default-src"] == "'none'"


def test_the_heat_maps_hold_the_singular_values_of_every_checkpoint(runs, page):
    spectra = ma.load_spectra(runs)
    shown = 0
    for run_, found in zip(page.data["runs"], page.data["spectra"], strict=True):
        for panel in found["panels"]:
            scales = {"total"} if panel["kind"] == "whole" else {"global", "mid", "layer"}
            for epoch, values in zip(found["when"], panel["values"], strict=True):
                rows = np.array(values, dtype=float).reshape(len(panel["units"]), panel["k"])
                table = spectra[
                    (spectra["run"] == run_["name"])
                    & (spectra["epoch"] == epoch)
                    & (spectra["module"] == panel["place"])
                    & spectra["scale"].isin(scales)
                ]
                assert len(table) == np.isfinite(rows).sum()
                for unit, row in zip(panel["units"], rows, strict=True):
                    scale, _, group = unit.partition(" ")
                    scale = "total" if panel["kind"] == "whole" else scale
                    sigma = table[(table["scale"] == scale) & (table["group"] == int(group or 0))]["sigma"]
                    assert row == pytest.approx(sigma.to_numpy(), rel=1e-3)
                    shown += len(sigma)
    assert shown == len(spectra)


def test_lines_are_means_of_the_metrics_table(runs, page):
    metrics = ma.load_metrics(runs)
    lines = page.data["means"]
    expected = metrics.groupby(["run", "scale", "epoch"])[list(numbers.MEASURES)].mean()
    assert len(lines["run"]) == len(expected)
    for i, (run_, scale, epoch) in enumerate(zip(lines["run"], lines["scale"], lines["when"], strict=True)):
        row = expected.loc[page.data["runs"][run_]["name"], scale, epoch]
        for name in numbers.MEASURES:
            value = np.nan if lines[name][i] is None else lines[name][i]
            assert value == pytest.approx(row[name], rel=1e-3, nan_ok=True)


def test_matrices_hold_the_pairs_of_the_last_checkpoint(runs, page):
    table = ma.load_pairs(runs, details=True)
    last = table[(table["epoch"] == table.groupby("run")["epoch"].transform("max")) & (table["scale"] != "total")]
    shown = 0
    for panel in page.data["pairs"]:
        of = last[
            (last["run"] == page.data["runs"][panel["run"]]["name"])
            & (last["module"] == panel["place"])
            & (last["scale"] == panel["scale"])
        ].set_index(["group_i", "group_j"])
        for n, (i, j) in enumerate(zip(panel["i"], panel["j"], strict=True)):
            row = of.loc[(panel["groups"][i], panel["groups"][j])]
            for name in numbers.PAIR_VALUES:
                value = panel[name][n] if isinstance(panel[name], list) else panel[name]
                assert value == pytest.approx(row[name], rel=1e-3, abs=1e-12)
        shown += len(panel["i"])
    assert shown == len(last) > 0


def test_rank_used_is_that_of_the_dense_update(runs, page):
    tensors = load_file(runs / "lora" / "checkpoint-20" / "adapter_model.safetensors")
    key = "base_model.model.encoder.layer.1.self.query.lora_{}.weight"
    sigma = np.linalg.svd(tensors[key.format("B")].astype(float) @ tensors[key.format("A")], compute_uv=False)
    table = page.data["matrices"]
    row = next(
        i
        for i, run_ in enumerate(table["run"])
        if page.data["runs"][run_]["name"] == "lora" and (table["place"][i], table["group"][i]) == ("query", 1)
    )
    energy = np.cumsum(sigma**2) / np.sum(sigma**2)
    assert table["rank_needed_90"][row] == np.argmax(energy >= 0.9) + 1
    assert table["rank_needed_99"][row] == np.argmax(energy >= 0.99) + 1 == energy_rank(sigma[:4])


def test_the_energy_that_each_rank_keeps_is_that_of_numpy(page, runs):
    of_run = {run_["name"]: i for i, run_ in enumerate(page.data["runs"])}
    drawn = page.data["energies"]["energy"]
    table = ma.load_spectra(runs / "lora")
    last = table[table["step"] == table["step"].max()]
    squares = last["sigma"].to_numpy() ** 2
    for run_, rank, share in zip(drawn["run"], drawn["when"], drawn["value"], strict=True):
        if run_ == of_run["lora"]:
            kept = squares[last["k"].to_numpy() <= rank].sum() / squares.sum()
            assert share == pytest.approx(kept, rel=1e-3)
    assert {*drawn["run"]} == {*of_run.values()}
    assert max(drawn["value"]) == 1


def test_the_training_curve_is_the_log(page):
    curves = page.data["curves"]
    assert list(curves) == ["training loss", "validation loss", "accuracy"]
    chosen = [i for i, run_ in enumerate(curves["accuracy"]["run"]) if page.data["runs"][run_]["name"] == "lora"]
    assert [curves["accuracy"]["when"][i] for i in chosen] == [0, 1, 2]
    assert [curves["accuracy"]["value"][i] for i in chosen] == [0.5, 0.5, 0.75]
    assert page.data["glance"]["task"] == ["cola", None]


def test_the_figures_that_one_asks_for_next_are_inside_with_their_numbers(page):
    captions = re.findall(r"(figure3|figure4|effective_rank_map): ([^\n]+?) PNG CSV", page.text)
    assert captions[0] == ("figure3", "MSPLoRA 8/8/8")
    assert captions[1] == ("figure4", "MSPLoRA 8/8/8 − LoRA r=4")
    assert {name for name, _ in captions} == {"figure3", "figure4", "effective_rank_map"}
    links = [
        a["href"]
        for a in page.all("a")
        if a.get("download", "").startswith("figure3") and a["href"].startswith("data:text/csv")
    ]
    csv = base64.b64decode(links[0].partition(",")[2]).decode()
    assert csv.startswith("variant,scale,epoch,k,sigma,rank,runs,matrices\nMSPLoRA 8/8/8,global,0,1,0.0,8,1,2\n")


def test_no_errors_are_no_alarm(runs, page):
    html = (runs.parent / "report.html").read_text()
    assert '<span class="none">0 errors</span>' in html


def test_findings_come_with_evidence_and_advice(tmp_path):
    folder = write_lora(tmp_path / "run", 2)
    same = lora_tensors(*(f"encoder.layer.{i}.self.{m}" for i in range(3) for m in ("query", "value")), rank=4)
    for name in list(same):
        if ".layer.1." in name:
            same[name] = same[name.replace(".layer.1.", ".layer.0.")]
    write_adapter(folder / "checkpoint-20", same, lora_config(r=4))
    page = read(ma.report(folder, tmp_path / "r.html"))
    assert "identical-update" in page.text
    assert "▲ warning" in page.text
    assert "Try:" in page.text


def test_a_checkpoint_with_nan_is_a_finding(tmp_path):
    folder = write_lora(tmp_path / "run", 2)
    tensors = load_file(folder / "checkpoint-20" / "adapter_model.safetensors")
    tensors = {name: values.copy() for name, values in tensors.items()}
    next(iter(tensors.values()))[0, 0] = np.nan
    write_adapter(folder / "checkpoint-20", tensors, lora_config(r=4))
    page = read(ma.report(folder, tmp_path / "r.html"))
    assert "non-finite" in page.text
    assert page.data["spectra"][0]["when"] == [0, 1]


def test_what_is_absent_is_said(tmp_path):
    write_adapter(tmp_path / "adapter", lora_tensors("layer.0.query"))
    page = read(ma.report(tmp_path / "adapter", tmp_path / "r.html"))
    assert page.text.count("Not drawn:") == 2
    assert "No matrices:" in page.text
    assert "2 runs" not in page.text
    assert page.data["means"] is None
    assert not page.data["curves"]
    assert "Methods compared" not in page.text


def test_modules_of_one_last_name_are_kept_apart(tmp_path):
    write_adapter(tmp_path / "a", lora_tensors("layer.0.attention.dense", "layer.0.output.dense", "pooler"))
    page = read(ma.report(tmp_path / "a", tmp_path / "r.html"))
    places = [panel["place"] for panel in page.data["spectra"][0]["panels"]]
    assert sorted(places) == ["layer.*.attention.dense", "layer.*.output.dense", "pooler"]


def test_two_methods_are_compared_in_sentences(page):
    assert "MSPLoRA 8/8/8 − LoRA r=4" in page.text  # the sign of Figure 4, whatever the order of the runs
    assert "one run of each: so few cannot decide" in page.text
    assert "Subspaces are not compared: ranks or last epochs differ." in page.text


@pytest.mark.slow
def test_tables_written_before_give_the_same_picture(runs, page, tmp_path):
    from msplora_analysis.tables.files import write_table

    write_table(ma.load_spectra(runs), tmp_path / "spectra.parquet")
    tables = ma.load_redundancy(runs, details=True)
    write_table(tables.pairs, tmp_path / "pairs.parquet")
    write_table(tables.scales, tmp_path / "scales.parquet")
    again = read(ma.report(tmp_path, tmp_path / "r.html")).data
    assert again["spectra"] == page.data["spectra"]
    assert again["pairs"] == page.data["pairs"]
    assert again["shared"] == page.data["shared"]


def test_names_from_files_stay_text(tmp_path):
    page = read(ma.report(write_hostile(tmp_path / "run"), tmp_path / "r.html"))
    assert len(page.scripts) == 3  # data, library, own
    assert not page.all("img")
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    shown = HOSTILE.replace("\u2028", "\\u2028")
    assert page.data["spectra"][0]["panels"][0]["place"].endswith(shown.rpartition(".")[2])
    assert page.text.count(shown) > 3


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "&lt;", "\u2028\u2029", "\ud800", 'a"\\b'])
def test_json_in_html_holds_its_text_and_no_markup(text):
    from msplora_analysis.show.report.page import json_in_html

    written = json_in_html({text: [text]})
    assert json.loads(written) == {text: [text]}
    assert not set("<>&\u2028\u2029") & set(written)
    assert written.isascii()


@pytest.mark.slow
def test_a_long_run_is_small_enough(tmp_path):
    path = ma.report(write_msplora(tmp_path / "run", 80), tmp_path / "r.html")
    assert path.stat().st_size < 5e6
    data = read(path).data
    assert data["spectra"][0]["when"] == list(range(81))
    assert data["spectra_note"] == ""


def test_thinned_checkpoints_are_told_and_the_last_is_kept(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(numbers, "VALUES", 50)  # of 3 checkpoints x 6 matrices x rank 4
    page = read(ma.report(runs / "lora", tmp_path / "r.html"))
    assert page.data["spectra"][0]["when"] == [0, 2]
    assert "1 of 3 checkpoints are left out" in page.text


def test_of_many_pairs_those_of_the_first_runs_are_kept_and_that_is_told(runs, monkeypatch):
    table = ma.load_pairs(runs, details=True)
    places = numbers.places_of(table["name_i"])
    kept, said = numbers.pairs(table, ["lora", "msplora"], places)
    assert ({panel["run"] for panel in kept}, said) == ({0, 1}, "")
    monkeypatch.setattr(numbers, "PAIRS", 1)
    kept, said = numbers.pairs(table, ["lora", "msplora"], places)
    assert {panel["run"] for panel in kept} == {0}
    assert said.endswith("the matrices of 1 of 2 runs.")


def test_equal_input_gives_equal_bytes(runs, tmp_path):
    first, second = (ma.report(runs / "lora", tmp_path / name).read_bytes() for name in "ab")
    assert first == second


def test_a_write_that_fails_leaves_what_was_there(runs, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("before")

    def fail(self, *_, **__):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ma.AnalysisError, match=r"report\.html: cannot be written: No space left on device"):
        ma.report(runs / "lora", out)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert out.read_text() == "before"


def test_the_command_prints_the_path(runs, tmp_path, capsys, monkeypatch):
    status, out, err = run(capsys, monkeypatch, "report", runs / "lora", "--out", tmp_path / "r.html")
    assert (status, out, err) == (0, f"{tmp_path / 'r.html'}\n", "")
    assert (tmp_path / "r.html").stat().st_size > 500_000


@pytest.mark.parametrize(
    ("out", "message"),
    [(".", "a folder; give the path of the file"), ("no/r.html", "no folder .*make it, or give another")],
)
def test_a_path_that_cannot_be_written_is_refused_at_once(out, message, tmp_path, capsys, monkeypatch):
    status, _, err = run(capsys, monkeypatch, "report", "nowhere", "--out", tmp_path / out)
    assert status == 1
    assert re.fullmatch(rf"error: --out .*{message}.*\n", err)


def test_without_the_drawing_library_it_says_what_to_install(runs, tmp_path, monkeypatch):
    from msplora_analysis.show.report import page

    page._library.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ma.AnalysisError, match=r"pip install 'msplora\[report\]'"):
        ma.report(runs / "lora", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(theme):
    block = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[theme]
    colours = dict(re.findall(r"--(\w+): (#\w+)", block))
    for ground in ("page", "box"):
        for text in ("ink", "soft", "link", "error", "warning", "info"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for line in ON_SCREEN:
        assert contrast(line, colours["page"]) >= 3, line
