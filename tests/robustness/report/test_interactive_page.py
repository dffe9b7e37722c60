"""The page of a report in a real browser: charts without a network, menus, sorting by keyboard, dark mode, paper."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import evaluation
from image_results import known_images, predict_cells, predicted

from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.report.write import write_report

pytestmark = pytest.mark.slow
LABELS = np.repeat(np.arange(4), 20)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every kind of chart."""
    results = evaluation(("plain", "dat"), ("imagenet", "generated", "cue-conflict", "words-random"))
    cells = list(results["cells"]["plain"]["generated"])
    for model, step in (("plain", 3), ("dat", 7)):
        predict_cells(results, model, "generated", LABELS, {cell: list(range(0, 80, step)) for cell in cells})
        predicted(results, model, "imagenet", LABELS, np.where(np.arange(80) % step, LABELS, (LABELS + 1) % 4))
        bins = [{"images": 40, "correct": 30, "confidence": 0.7}, {"images": 40, "correct": 38, "confidence": 0.9}]
        results.setdefault("reliability", {})[model] = {"imagenet": bins}  # type: ignore[typeddict-item]
    for suite in ("imagenet", "generated"):
        known_images(results, suite, LABELS)
    return write_report(summarize(results), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium found: install it to check the charts")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def open_page(browser: Any, file: Path, width: int = 1280, **options: Any) -> tuple[Any, list[str]]:
    """A page with its charts drawn, and everything that went wrong or was asked of a network."""
    page = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
    page.goto(file.as_uri())
    page.wait_for_selector("html.charts-ready", state="attached", timeout=120_000)
    return page, faults


def test_every_chart_is_drawn_at_three_widths_without_a_network(browser: Any, page_file: Path) -> None:
    for width in (390, 768, 1280):
        page, faults = open_page(browser, page_file, width)
        assert not faults
        charts = page.locator("figure:has(.plot)")
        assert charts.count() == page.locator("figure.drawn .plot svg").count() >= 9
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for box in page.locator("figure.drawn .plot svg").all():
            size = box.bounding_box()
            assert size["width"] > 200
            assert size["x"] + size["width"] <= width


def names_from_the_top(figure: Any) -> list[str]:
    """The labels of the rows of a heat map."""
    labels = [(text.bounding_box()["y"], text.text_content()) for text in figure.locator(".role-axis-label text").all()]
    return [name for _, name in sorted(labels) if not name.isdigit()]


def test_a_menu_sorts_the_heat_map_and_a_key_sorts_a_table(browser: Any, page_file: Path) -> None:
    page, faults = open_page(browser, page_file)
    figure = page.locator("figure:has(.controls select[name='order'])").first
    assert names_from_the_top(figure) != sorted(names_from_the_top(figure))
    figure.locator("select[name='order']").select_option("name")
    page.wait_for_timeout(500)
    assert names_from_the_top(figure) == sorted(names_from_the_top(figure))
    figure.locator(".mark-text text", has_text=".").nth(7).hover()
    assert "severity" in page.locator("#vg-tooltip-element").inner_text()
    head = page.locator("table.headline thead button").first
    head.focus()
    page.keyboard.press("Enter")
    assert page.locator("table.headline th[aria-sort='descending']").count() == 1
    assert not faults


def test_dark_pages_have_light_text_and_paper_has_the_images(browser: Any, page_file: Path) -> None:
    page, _ = open_page(browser, page_file, color_scheme="dark")
    fill = page.locator(".role-axis-label text").first.evaluate("text => getComputedStyle(text).fill")
    assert fill == "rgb(230, 231, 234)"
    page.emulate_media(media="print")
    assert page.locator("figure.drawn .plot").first.is_hidden()
    assert page.locator("figure.drawn .static").first.is_visible()
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(page_file.as_uri())
    assert plain.locator("figure .static").first.is_visible()


def test_charts_and_tables_have_names_for_screen_readers(browser: Any, page_file: Path) -> None:
    page, _ = open_page(browser, page_file)
    assert all(plot.get_attribute("aria-label") for plot in page.locator(".plot").all())
    assert page.locator("main table:not(:has(caption))").count() == 0
    assert page.locator("main th:not([scope])").count() == 0
    assert page.locator("img:not([alt])").count() == 0
    levels = [int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => h.tagName)")]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
