"""The page of `report` in a real browser: Debian's Chromium, without a network."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from reports import HOSTILE, write_hostile, write_lora, write_msplora

import msplora_analysis as ma

pytestmark = pytest.mark.slow  # starts a browser; test_report.py looks at what the page holds
SHOWN = HOSTILE.replace("\u2028", "\\u2028")


@pytest.fixture(scope="session")
def report(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    write_lora(root / "runs" / "lora", 2)
    write_msplora(root / "runs" / "msplora", 3, layers=3)
    return ma.report(root / "runs", root / "report.html")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    return ma.report(write_hostile(root / "run"), root / "report.html")


@contextmanager
def opened(browser, path: Path, width: int = 1280, silent: bool = True, **options):
    """The page when all is drawn. With ``silent``, nothing may be asked of a network or said on the console."""
    with browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options) as context:
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn=yes]", state="attached", timeout=300_000)
        yield page
        assert said == [] or not silent


@pytest.fixture(scope="module")
def page(browser, report):
    """One page for tests that each have controls of their own."""
    with opened(browser, report) as page:
        yield page


FILLS = "(id) => [...document.querySelectorAll(`#${id} .mark-rect.role-mark path`)].map((p) => p.getAttribute('fill'))"


def fills(page, chart: str) -> list[str]:
    return page.evaluate(FILLS, chart)


def wait_until_redrawn(page, chart: str, before: list[str]) -> None:
    page.wait_for_function(f"([id, before]) => ({FILLS})(id).join() !== before.join()", arg=[chart, before])


def test_every_section_is_drawn(page):
    charts = "means-layer means-global spectra-sigma-0 between-kl-1 needed-map energies-energy curve-0"
    for chart in charts.split():
        assert page.locator(f"#{chart} svg").count() == 1, chart
        assert page.locator(f"#{chart}").get_attribute("aria-label")
    assert len(fills(page, "between-kl-0")) == 9
    assert page.locator("#table-matrices tbody tr").count() == 6 + 2 * (1 + 3 + 3 + 3)


def test_the_slider_moves_the_picture(page):
    before = fills(page, "spectra-sigma-1")
    slider = page.locator("#spectra-when")
    slider.focus()
    assert page.locator("#spectra-now").text_content() == "epoch 3"
    page.keyboard.press("ArrowLeft")
    wait_until_redrawn(page, "spectra-sigma-1", before)
    assert page.locator("#spectra-now").text_content() == "epoch 2"
    assert slider.get_attribute("aria-valuetext") == "epoch 2"
    assert len(set(fills(page, "spectra-sigma-1"))) > 5
    before = fills(page, "spectra-sigma-1")
    page.keyboard.press("Home")  # where every update is zero
    wait_until_redrawn(page, "spectra-sigma-1", before)
    assert len(set(fills(page, "spectra-sigma-1"))) == 1
    assert page.locator("#spectra-now").text_content() == "epoch 0"


def test_hovering_shows_the_value(page, report):
    pairs = ma.load_pairs(report.parent / "runs" / "lora", details=True)
    row = pairs[
        (pairs["epoch"] == 2) & (pairs["module"] == "query") & (pairs["group_i"] == 0) & (pairs["group_j"] == 2)
    ]
    page.locator("#between-overlap_in-0 .mark-rect.role-mark path").nth(2).hover()  # row 0, column 2
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    keys, values = (tooltip.locator(f"td.{kind}").all_text_contents() for kind in ("key", "value"))
    cells = dict(zip(keys, values, strict=True))
    assert (cells["i"], cells["j"]) == ("0", "2")
    assert float(cells["overlap"]) == pytest.approx(row["overlap_in"].item(), rel=1e-3)
    assert float(cells["by chance"]) == pytest.approx(row["expected_in"].item(), rel=1e-3)


def test_choosing_a_module_changes_all_that_shows_it(page):
    before = fills(page, "between-kl-0")
    page.select_option("#between-place", "value")
    wait_until_redrawn(page, "between-kl-0", before)
    page.select_option("#spectra-place", "value")
    assert "value" in page.locator("figure:has(#spectra-sigma-0) figcaption").text_content()


def test_tables_sort_and_filter_by_keyboard(page):
    header = page.locator("#table-matrices th", has_text="effective rank")
    header.locator("button").focus()
    column = 1 + page.eval_on_selector_all(
        "#table-matrices th", "all => all.findIndex(th => th.textContent === 'effective rank')"
    )

    def shown() -> list[float]:
        return [float(text) for text in page.locator(f"#table-matrices td:nth-child({column})").all_text_contents()]

    assert header.get_attribute("aria-sort") == "none"
    for direction, reverse in (("ascending", False), ("descending", True)):
        page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == direction
        assert shown() == sorted(shown(), reverse=reverse)
    page.locator("#table-matrices-filter").fill("MSPLORA mid value")
    assert page.locator("#table-matrices tbody tr").count() == 3
    assert page.locator("#table-matrices [role=status]").text_content() == "3 of 26 rows"


def test_a_phone_needs_no_sideways_scrolling_and_a_keyboard_skips_to_the_report(browser, report, hostile):
    for path in (report, hostile):
        with opened(browser, path, width=390) as page:
            page.keyboard.press("Tab")  # the keyboard comes first to the skip link
            assert page.evaluate("document.activeElement.className") == "skip"
            assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.id") == "main"
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            out = page.evaluate(
                """() => [...document.querySelectorAll("main *")]
                    .filter((one) => !one.closest(".scroll, pre, svg, select"))
                    .filter((one) => one.getBoundingClientRect().right > 391)
                    .map((one) => one.outerHTML.slice(0, 80))"""
            )
            assert out == []


def test_dark_and_paper_have_their_own_colours(browser, report):
    colours = """() => [getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector("#means-layer .role-axis-label text")).fill,
        getComputedStyle(document.body).color]"""
    with opened(browser, report, color_scheme="dark") as page:
        ground, label, text = page.evaluate(colours)
        assert (ground, label) == ("rgb(20, 24, 29)", text)
        page.emulate_media(media="print")
        ground, label, text = page.evaluate(colours)
        assert (ground, label, text) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)", "rgb(0, 0, 0)")
        assert page.locator("details:not([open])").count()
        page.pdf()
        assert page.locator("details:not([open])").count()  # folded again after it was printed
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open])").count() == 0


def test_what_is_drawn_can_be_taken_along(page):
    for kind, begin in (("CSV", "run,label,shown,when,value\n"), ("SVG", "<svg ")):
        with page.expect_download() as download:
            page.locator("figure:has(#means-layer) button", has_text=kind).click()
        assert download.value.suggested_filename == f"means-layer.{kind.lower()}"
        assert Path(download.value.path()).read_text().startswith(begin)


def test_titles_and_tiles_say_what_is_measured(browser, report):
    said = "span => span.title"
    with opened(browser, ma.report(report.parent / "runs" / "lora", report.with_name("one.html"))) as page:
        for chart, words in (("means-layer", "Roy & Vetterli"), ("between-kl-0", "eq. 10"), ("energies-energy", "Σσ²")):
            assert words in page.locator(f"figure:has(#{chart}) figcaption span").evaluate(said)
        assert "Roy & Vetterli" in page.locator(".cards .what", has_text="effective rank").evaluate(said)
        page.select_option("#means-measure", "m_eff_1")
        assert "high = concentrated" in page.locator("figure:has(#means-layer) figcaption span").evaluate(said)


def test_panels_of_one_measure_share_an_axis(page):
    tops = [
        page.locator(f"#means-{scale} .role-axis-label text").all_text_contents()[-1]
        for scale in ("global", "mid", "layer", "total")
    ]
    assert len(set(tops)) == 1


def test_two_runs_print_on_six_pages(browser, report):
    with opened(browser, report) as page:
        assert len(re.findall(rb"/Type\s*/Page\b", page.pdf())) <= 6


def test_hostile_names_are_text_everywhere(browser, hostile):
    with opened(browser, hostile) as page:
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 3
        place = page.locator("#table-matrices td").first.text_content()
        assert SHOWN.endswith(place)
        assert "<img src=x onerror=" in place
        assert SHOWN in page.locator("#provenance").text_content()
        page.locator("#needed-map .mark-rect.role-mark path").first.hover()
        tooltip = page.locator("#vg-tooltip-element.visible")
        tooltip.wait_for()
        assert "<img src=x" in tooltip.text_content()
        assert page.locator("img").count() == 0


def test_the_policy_stops_what_escaping_might_miss(browser, hostile):
    with opened(browser, hostile, silent=False) as page:
        ran = page.evaluate(
            """async () => {
                const blocked = [];
                document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.violatedDirective));
                document.body.insertAdjacentHTML("beforeend", "<b onclick='window.ran = 1'>b</b>");
                document.body.lastElementChild.click();
                const script = document.createElement("script");
                script.textContent = "window.ran = 2";
                document.body.append(script);
                try { await fetch("https://example.org/"); window.ran = 3; } catch { /* as it should be */ }
                await new Promise((done) => setTimeout(done, 100)); // violations are told later
                return [window.ran ?? null, blocked.sort()];
            }"""
        )
        assert ran == [None, ["connect-src", "script-src-attr", "script-src-elem"]]
