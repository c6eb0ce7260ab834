"""The site builds without a warning, needs nothing from elsewhere, and leaves out nothing of the code."""

from __future__ import annotations

import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer

import msplora_analysis as ma
import msplora_analysis.cli
import msplora_core
import msplora_core.cli
import msplora_core.measure.cli
from msplora_analysis.ask import nulls
from msplora_analysis.ask.comparison import compare
from msplora_analysis.ask.findings import KINDS, base
from msplora_analysis.ask.results import summary
from msplora_analysis.compute.measures import registry
from msplora_analysis.tables import columns as spectra_columns
from msplora_analysis.tables import nulls as null_tables
from msplora_analysis.tables import pairs as load
from msplora_analysis.write import share
from msplora_core.measure.ablation import ablate

from .core.test_ablation import adapted, batches_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
RUNS = [ROOT / "examples" / "runs" / name for name in ("lora-8", "msplora-8-8-8")]


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Site:
    def __init__(self, folder: Path, said: list[str], warned: list[str]) -> None:
        self.folder, self.said, self.warned = folder, said, warned
        self.pages = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.html"))}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The site, built as `mkdocs build --strict` builds it, and what was logged."""
    patch = pytest.MonkeyPatch()
    patch.setenv("NO_MKDOCS_2_WARNING", "1")  # the theme's word on the future of MkDocs
    patch.chdir(ROOT)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    heard, folder = _Records(), tmp_path_factory.mktemp("site")
    logger = logging.getLogger("mkdocs")
    patch.setattr(logger, "level", logging.INFO)
    logger.addHandler(heard)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        logger.removeHandler(heard)
        patch.undo()
    said = [(record.levelno, record.getMessage()) for record in heard.records]
    return Site(folder, [text for _, text in said], [text for level, text in said if level > logging.INFO])


def test_the_site_builds_without_a_warning(site: Site) -> None:
    assert any("Documentation built" in text or "Building documentation" in text for text in site.said)
    assert not site.warned
    assert not [text for text in site.said if "link" in text], "MkDocs notes a link"
    pages = {path.with_suffix(".html").name for path in DOCS.glob("*.md")}
    assert site.pages.keys() == pages | {"404.html"}


@pytest.mark.slow
def test_search_works_on_pages_opened_from_the_disk(site: Site, browser: Any) -> None:
    with browser.new_context(offline=True) as context:
        page = context.new_page()
        for _ in range(6):  # now and then the theme's search does not start
            page.goto((site.folder / "index.html").as_uri())
            page.wait_for_timeout(3_000)  # what is typed before the page listens is lost
            page.fill("input[name=query]", "effective rank")
            page.wait_for_timeout(5_000)
            if page.locator(".md-search-result__item").count():
                break
        assert "metrics.html" in page.inner_html(".md-search-result__list")


class _Fetched(HTMLParser):
    """Addresses that a browser fetches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag != "a":
            self.found += [value for name in ("src", "href", "srcset", "data", "poster") if (value := given.get(name))]


def test_pages_fetch_nothing_from_elsewhere(site: Site) -> None:
    for name, html in site.pages.items():
        parser = _Fetched()
        parser.feed(html)
        assert parser.found
        assert not [address for address in parser.found if re.match(r"(https?:)?//", address)], name
        for address in parser.found:
            path = site.folder / address.partition("#")[0].partition("?")[0].lstrip("/")
            assert address.startswith("data:") or path.exists(), (name, address)
        assert not re.search(r"url\(['\"]?(https?:)?//|@import|class=\"[^\"]*mermaid", html), name
    for style in site.folder.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text(encoding="utf-8")), style


def test_formulas_are_drawn_by_the_browser(site: Site) -> None:
    blocks = (DOCS / "metrics.md").read_text(encoding="utf-8").count("```math")
    assert site.pages["metrics.html"].count("<math ") >= blocks > 10


def test_pictures_of_the_repository_are_on_the_site(site: Site) -> None:
    for page in ("figures.md", "study.md"):
        pictures = re.findall(r"!\[[^\]]*\]\(\.\./([^)]+)\)", (DOCS / page).read_text(encoding="utf-8"))
        assert pictures
        for picture in pictures:
            assert (site.folder / "repository" / picture).read_bytes() == (ROOT / picture).read_bytes()


def test_every_command_and_option_is_on_the_page(site: Site) -> None:
    page = site.pages["commands.html"]
    analyze: Any = typer.main.get_command(msplora_analysis.cli.app)
    train: Any = typer.main.get_command(msplora_core.cli.app)
    measure: Any = typer.main.get_command(msplora_core.measure.cli.app)
    commands = {f"msplora-analyze {name}": command for name, command in analyze.commands.items()}
    commands |= {f"msplora-measure {name}": command for name, command in measure.commands.items()}
    for name, command in {**commands, "msplora-train": train}.items():
        section = re.search(rf"<h[23][^>]*><code>{name}</code>.*?(?=<h[23]|</article>)", page, re.DOTALL)
        assert section, name
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert option == "--help" or option in section[0], f"{name} {option}"
        assert "msplora-" in section[0].partition("Examples:")[2], f"{name} has no examples"


def test_every_public_name_is_on_the_python_page(site: Site) -> None:
    page = site.pages["python.html"]
    for name in {*ma.__all__} - {"__version__"}:
        assert f'id="msplora_analysis.{name}"' in page, name
    assert 'id="msplora_core.MSPLoraConfig"' in page
    assert 'id="msplora_core.record_moments"' in page
    assert {"MSPLoraConfig", "MSPLoraModel", "__version__", "record_moments"} == {*msplora_core.__all__}
    assert "m_eff_&lt;k&gt;" in page


# Tables


def documented(title: str) -> dict[str, str]:
    """Column → type, as tables.md has them."""
    text = (DOCS / "tables.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    columns: dict[str, str] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            columns |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells[1])
    return columns


def types(table: pd.DataFrame) -> dict[str, str]:
    return {name: str(kind) for name, kind in table.dtypes.items()}


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Of a toy model, as if it had cost what was predicted."""
    table = ablate(adapted("bert", "msplora"), batches_of("bert")).table("accuracy")
    folder = tmp_path_factory.mktemp("toy")
    table.assign(predicted_kl=table["kl"]).to_parquet(folder / "ablation.parquet")
    return ma.load_ablation(folder)


@pytest.fixture(scope="module")
def redundancy() -> Any:
    return ma.load_redundancy(RUNS, details=True)


def test_spectra_and_metrics_are_documented() -> None:
    spectra, measures = ma.load_tables(RUNS)
    assert documented("spectra") == types(spectra) | spectra_columns.TASK
    assert documented("metrics") == types(measures) | dict.fromkeys(spectra_columns.TASK_MEASURES, "float64")


def test_pairs_and_scales_are_documented(redundancy: Any) -> None:
    assert documented("pairs") == types(redundancy.pairs) | load.PAIRS_TASK
    assert documented("scales") == types(redundancy.scales) | load.SCALES_TASK
    assert documented("pairs").keys() == load.PAIRS.keys() | load.PAIRS_TASK.keys() | load.DETAILS.keys()
    assert documented("scales").keys() == load.SCALES.keys() | load.SCALES_TASK.keys() | load.DETAILS.keys()


def test_null_models_are_documented() -> None:
    assert documented("nulls") == nulls.COLUMNS
    assert documented("nulls_pairs") == null_tables.PAIRS
    assert documented("joint") == null_tables.JOINT


def test_comparison_findings_and_results_are_documented() -> None:
    assert documented("comparison") == compare.COLUMNS
    assert documented("findings") == {name: {"Float64": "Int64"}.get(kind, kind) for name, kind in base.COLUMNS.items()}
    results = types(summary.load_results([str(run) for run in RUNS]))
    assert documented("results") == results


def test_ablations_are_documented(ablation: pd.DataFrame) -> None:
    found = types(ablation)
    assert list(found.items())[4:] == list(documented("ablation").items())


def test_ranks_are_documented(tmp_path: Path) -> None:
    adapter = RUNS[0] / "checkpoint-270"
    with pytest.warns(UserWarning, match="no head"):
        written = types(ma.export(adapter, tmp_path / "a")) | types(ma.compress(adapter, tmp_path / "b", rank=2))
    task = dict.fromkeys(("task_norm", "task_energy", "task_error"), "float64")  # of an adapter with moments
    assert documented("ranks.csv of export and compress") == written | task


def test_ranks_of_extract_are_documented(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for number, name in enumerate(("base", "tuned")):
        (tmp_path / name).mkdir()
        save_file({"layers.0.up.weight": np.eye(4) * (1 + number)}, tmp_path / name / "model.safetensors")
    written = ma.extract(tmp_path / "tuned", tmp_path / "adapter", base=tmp_path / "base", rank=2)
    assert documented("ranks.csv of extract") == types(written)


def test_sharing_is_documented() -> None:
    assert documented("sharing") == {**share.COLUMNS, **share.TASK_COLUMNS}


def test_numbers_of_figures_are_documented(redundancy: Any, ablation: pd.DataFrame) -> None:
    from msplora_analysis.show.figures import _plots

    text = (DOCS / "tables.md").read_text(encoding="utf-8").split("## Numbers of figures")[1]
    common = set(re.findall(r"`(\w+)`", text.partition("|")[0]))
    rows = dict(re.findall(r"^\| (`.+?) \| (.+) \|$", text, re.MULTILINE))
    plots = _plots(ma.load_spectra(RUNS), None, redundancy.pairs, redundancy.scales, ablation)
    seen = set()
    for plot in plots:
        files = next(
            files
            for files in rows
            if any(re.fullmatch(n.replace("*", ".*"), plot.stem) for n in re.findall(r"`([^`]+)`", files))
        )
        seen.add(files)
        assert set(re.findall(r"`(\w+)`", rows[files])) == {*plot.numbers.columns} - common, plot.stem
    assert {files for files in rows if not re.search("comparison|layers_share|nulls|joint|intervals", files)} == seen


# What the pages say of the code


def test_every_measure_has_formula_source_and_example() -> None:
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### ([^\n]+)\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE))
    named = {name: title for title in sections for name in re.findall(r"\w+", title.partition("{")[0])}
    columns = {
        name
        for name in {**documented("metrics"), **documented("pairs")}
        if documented("metrics").get(name, documented("pairs").get(name)) == "float64"
    }
    derived = {"m_eff_1": "m_eff_k", "m_eff_2": "m_eff_k", "m_eff_4": "m_eff_k"} | dict.fromkeys(
        ("expected_in", "expected_out", "deviation_in", "deviation_out"), "overlap_expected"
    )
    for column in columns:
        body = sections[named[derived.get(column, column)]]
        assert "```math" in body, column
        assert "```python" in body, column
        assert column == "cosine" or "*Source" in body, column


@pytest.mark.parametrize("measure", registry.families(), ids=lambda measure: measure.name)
def test_every_measure_of_a_spectrum_says_in_the_docs_what_it_says_in_the_code(measure: registry.Measure) -> None:
    name = measure.name.partition("_{")[0]
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### ([^\n]+)\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    (body,) = (body for title, body in sections if name in re.findall(r"\w+", title))
    assert measure.formula in body
    assert f"*Source: {measure.source}." in body
    assert "```python" in body


def test_every_finding_has_its_section() -> None:
    """As `diagnose` prints it now, with what to do, and its rates as they are in the tables."""
    text = (DOCS / "findings.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### `([\w-]+)` \{ #\1 \}\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE))
    assert sections.keys() == KINDS.keys()
    for name, body in sections.items():
        shown = " ".join("".join(re.findall(r"```text\n(.*?)```", body, re.DOTALL)).split())
        assert not shown or shown.startswith(f"{KINDS[name].severity} {name}: {KINDS[name].title}"), name
        assert "**What to do**" in body, name
    rates = ROOT / "figures" / "findings"
    seen = pd.read_csv(rates / "false_alarms.csv")
    assert set(seen["id"]) == KINDS.keys() - {"large-relative-update", "intruder-dimensions"}
    for row in seen.itertuples():
        assert f"| {row.severity} | {row.seen} of {row.runs} | {100 * row.at_most:.1f} % |" in text, row.id
    for row in pd.read_csv(rates / "detected.csv").itertuples():
        assert f"{row.found} of {row.runs}" in re.search(rf"^\| \[`{row.id}`.*", text, re.MULTILINE)[0], row.fault  # type: ignore[index]


def test_every_figure_has_how_to_read_it() -> None:
    text = (DOCS / "figures.md").read_text(encoding="utf-8")
    from msplora_analysis.show.drawing.plot import KINDS

    sections = dict(re.findall(r"^## [^\n]*\{ #(\w+) \}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert {name.removesuffix("_over_epochs") for name in KINDS} == sections.keys()
    for anchor, body in sections.items():
        for part in ("**Shows**", "**Read it**", "**It can't show**"):
            assert part in body, f"{anchor}: {part}"


def test_every_style_of_a_venue_is_named() -> None:
    from msplora_analysis.show.drawing.venues import VENUES

    text = (DOCS / "figures.md").read_text(encoding="utf-8")
    assert ", ".join(VENUES) in " ".join(text.split())


def test_links_of_the_readme_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "figures" / "README.md"):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert re.match("https?://", link) or (page.parent / link).exists(), (page, link)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (
            "One.\n\nrank: of all,\n    or one.\nout: where.\n\nEnd.",
            "One.\n\n- **`rank`**: of all,\n    or one.\n- **`out`**: where.\n\nEnd.",
        ),
        ("Take:\nrank, out: both\nand more", "Take:\n\n- **`rank`**, **`out`**: both\n    and more"),
        ("Columns: rank, out", "Columns: rank, out"),
    ],
)
def test_parameters_become_a_list(docstring: str, expected: str) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("docstrings", DOCS / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.listed(docstring, {"rank", "out"}) == expected
