"""The report on a wide and a narrow screen, in light and dark, with a keyboard only, and for screen readers."""

import re
from pathlib import Path

import numpy as np
import pytest

from eval_mcq.html_report import ReportOptions, write_report
from eval_mcq.html_report.figures import IN_PAGE, PALETTE, STRONGEST
from eval_mcq.items.schema import Bench, load_bench
from eval_mcq.records.backend_record import BackendRecord
from eval_mcq.records.model_history import (
    AlignmentSummary,
    FittedConnector,
    ModelHistory,
    TrainingSummary,
)
from eval_mcq.records.run_record import Run
from eval_mcq.tables.summary import compare
from eval_mcq.tables.table_layout import by_disease
from tests import browser as browsers
from tests.builders import picture
from tests.eval_mcq.helpers import question, run_of_bench, write_bench

DISEASES = (
    "AMD", "Cataract", "CSR", "DR", "Glaucoma", "Media Haze", "Myopia", "Retinitis", "DME", "Tessellation",
)  # fmt: skip
ARMS = {"base": 2, "control": 3, "aligned": 4, "+ MGLL": 7, "+ MGLL, LoRA": 11}
"""Arm -> every which question it answers wrongly."""

WIDE = 1280 - 15
"""Width of a page on a screen of 1280 pixels, less the bar for scrolling."""

TOWER = TrainingSummary(title="tower (pretrain)", images=900, losses=((10, 5.0), (20, 3.25)))
FITTED = AlignmentSummary(
    used=500,
    held_out=100,
    connectors=(
        FittedConnector(
            connector="multi_modal_projector.linear_1", r2=0.912, r2_unaligned=-0.31, relative_error=0.23,
            strength=1e-3, towards="kept",
        ),
    ),
)  # fmt: skip


def retrained(last: float) -> TrainingSummary:
    return TrainingSummary(
        title="projector (retrain-projector)", images=640, losses=((1, 2.5), (50, last)), scores=((50, 0.61),)
    )


HISTORIES = {
    "control": ModelHistory(trainings=(retrained(0.75),)),
    "aligned": ModelHistory(trainings=(TOWER,), alignment=FITTED),
    "+ MGLL": ModelHistory(trainings=(TOWER, retrained(0.5)), alignment=FITTED),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """Ten diseases with ten questions each."""
    folder = tmp_path_factory.mktemp("five")
    for name in DISEASES:
        picture(folder, f"{name}.png")
    questions = [
        question(f"q{i}", f"{DISEASES[i % 10]}.png", category=DISEASES[i % 10], patient=f"p{i}")
        for i in range(100)
    ]
    return load_bench(write_bench(folder / "bench.jsonl", questions, categories=list(DISEASES)))


@pytest.fixture(scope="module")
def five(bench) -> dict[str, Run]:
    return {
        arm: run_of_bench(
            bench, lambda number, every=every: (number // 10) % every == 0, history=HISTORIES.get(arm)
        )
        for arm, every in ARMS.items()
    }


@pytest.fixture(scope="module")
def written(five, bench) -> Path:
    out = bench.path.with_name("report.html")
    write_report(five, bench, out, ReportOptions())
    return out


@pytest.fixture
def desktop(browser, written):
    with browsers.screen(browser, WIDE, 900):
        browsers.show(browser, written)
        yield browser


@pytest.fixture
def telephone(browser, written):
    with browsers.screen(browser, 390, 844):
        browsers.show(browser, written)
        yield browser


def widths(page, selector: str) -> list[list[int]]:
    return page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => [e.scrollWidth, e.clientWidth])",
        selector,
    )


def test_five_arms_on_ten_diseases_fit_in_1280_pixels(desktop, five):
    assert widths(desktop, "html") == [[WIDE, WIDE]]
    assert {whole - seen for whole, seen in widths(desktop, ".scroll")} == {0}
    assert not any(cue.is_displayed() for cue in desktop.find_elements("css selector", ".cue"))
    shown = desktop.find_elements("css selector", "#table tbody tr")
    for row, cells in zip(shown, by_disease(compare(five)).rows, strict=True):  # as in the terminal
        disease, n, chance, *figures = cells
        assert row.text.split() == f"{disease} {n}, {chance} % {' '.join(figures)}".split()


def test_a_telephone_keeps_the_diseases_in_sight_and_says_that_there_is_more(telephone):
    assert widths(telephone, "html") == [[390, 390]]
    area = telephone.find_element("css selector", "#table .scroll")
    frame = telephone.find_element("css selector", "#table .wide")
    assert area.find_element("xpath", "preceding-sibling::p").text == "Scroll sideways for more columns →"
    assert frame.get_attribute("class").split() == ["wide", "scrolls", "more"]
    disease = telephone.find_element("css selector", "#table tbody th")
    before = disease.rect["x"]
    telephone.execute_script("arguments[0].scrollTo({left: 1e6, behavior: 'instant'})", area)
    telephone.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert disease.rect["x"] == before
    assert disease.rect["width"] < 390 / 2
    assert frame.get_attribute("class").split() == ["wide", "scrolls"]  # no shadow at the end


def test_more_arms_than_fit_come_in_parts_that_repeat_the_first_arm(browser, bench, tmp_path):
    runs = {name: run_of_bench(bench, lambda number, every=every: number % every == 0)
            for every, name in enumerate(("base", "control", "a", "b", "c", "d", "e"), start=2)}  # fmt: skip
    write_report(runs, bench, tmp_path / "report.html", ReportOptions(images=False))
    with browsers.screen(browser, WIDE, 900):
        browsers.show(browser, tmp_path / "report.html")
        heads = browser.execute_script(
            "return [...document.querySelectorAll('#table table')].map("
            "table => [...table.querySelectorAll('[scope=colgroup]')].map(cell => cell.textContent))"
        )
        assert heads == [["base", "control", "a", "b", "c"], ["base", "d", "e"]]
        assert [whole - seen for whole, seen in widths(browser, "#table .scroll")] == [0, 0]


def test_curves_trainings_and_alignments_are_read_from_the_runs(desktop):
    models = desktop.find_element("id", "models")
    titles = [figure.text for figure in models.find_elements("tag name", "h3")]
    assert titles == [
        "Training loss: projector (retrain-projector)",
        "Training score: projector (retrain-projector)",
        "Training loss: tower (pretrain)",
    ]
    trainings, alignments = models.find_elements("tag name", "table")
    assert "control projector (retrain-projector) 640 50 2.5 0.75" in trainings.text
    assert "aligned; + MGLL tower (pretrain) 900 20 5 3.25" in trainings.text
    assert "multi_modal_projector.linear_1 500 (100) 0.912 -0.310 0.230 1.0e-03 kept" in alignments.text
    shared = models.find_elements("css selector", "figure")[2]
    assert "aligned; + MGLL" in shared.text


def test_the_table_of_runs_names_the_engine_of_each(bench, tmp_path):
    served = BackendRecord(name="vllm", version="0.32.0", sent={"max_tokens": 1})
    runs = {
        "ours": run_of_bench(bench, lambda number: number % 2 == 0),
        "served": run_of_bench(bench, lambda number: number % 3 == 0, backend=served),
    }
    write_report(runs, bench, tmp_path / "r.html", ReportOptions(images=False))
    table = (tmp_path / "r.html").read_text().partition('id="runs"')[2]
    head, *rows = re.findall(r"<tr>(.*?)</tr>", table)
    place = re.findall(r"<th[^>]*>(.*?)</th>", head).index("engine")
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert [(row[0], row[place]) for row in cells] == [("ours", "eval-mcq"), ("served", "vllm 0.32.0")]


def test_a_report_of_runs_without_records_has_no_such_part(bench, tmp_path):
    write_report(
        {"a": run_of_bench(bench, lambda number: False)}, bench, tmp_path / "r.html", ReportOptions()
    )
    assert 'id="models"' not in (tmp_path / "r.html").read_text()


def test_every_cell_of_a_table_has_headers_and_every_picture_a_text(desktop):
    bare = "return [...document.querySelectorAll(arguments[0])].map(e => e.outerHTML.slice(0, 80))"
    assert desktop.execute_script(bare, "th:not([scope])") == []
    assert desktop.execute_script(bare, "img:not([alt]), img[alt='']") == []
    assert desktop.execute_script(bare, "[role=img]:not([aria-labelledby][aria-describedby])") == []
    named = desktop.execute_script(
        "return [...document.querySelectorAll('main [aria-labelledby], main [aria-describedby]')].every(e =>"
        " [e.getAttribute('aria-labelledby'), e.getAttribute('aria-describedby')].filter(Boolean)"
        ".every(id => document.getElementById(id)?.textContent.trim()))"
    )
    assert named


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(telephone):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    seen = []
    for _ in range(30):
        ActionChains(telephone).send_keys(Keys.TAB).perform()
        at = telephone.switch_to.active_element
        seen.append(
            at.get_attribute("href") or at.get_attribute("name") or at.get_attribute("aria-label") or at.text
        )
        if at.tag_name == "button" and at.find_elements("tag name", "strong"):
            break
    links = [one.rpartition("#")[2] for one in seen[:5]]
    assert links == ["table", "plots", "questions", "models", "runs"]
    assert seen[5:-1] == [
        "Results by disease", "category", *(f"arm-{i}" for i in range(5)), "flip", "text", "Clear",
    ]  # fmt: skip
    assert "AMD" in seen[-1]
    outline = telephone.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_the_search_key_belongs_to_the_questions(desktop):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(desktop).send_keys("/").perform()
    assert desktop.switch_to.active_element.tag_name == "body"
    desktop.execute_script("document.querySelector('#list button').focus()")
    ActionChains(desktop).send_keys("/").perform()
    assert desktop.switch_to.active_element.get_attribute("name") == "text"


def test_numbers_are_legible_on_the_strongest_cell_of_a_confusion_plot_in_both_schemes(written):
    page = written.read_text()
    assert IN_PAGE.text not in page
    assert IN_PAGE.line not in page
    for color in PALETTE:
        for ground, ink in (("#ffffff", "#1a1a1a"), ("#15171a", "#ececec")):
            cell = (0.1 + STRONGEST) * rgb(color) + (0.9 - STRONGEST) * rgb(ground)
            assert contrast(cell, rgb(ink)) >= 4.5, (color, ground)


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """WCAG 2 contrast ratio of two colors, 0-1."""

    def luminance(color: np.ndarray) -> float:
        linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_core_finds_nothing_wrong(browser, written, scheme, width):
    if not browsers.AXE.is_file():
        pytest.skip(f"needs axe-core at {browsers.AXE}: make axe, or set MGLL_AXE")
    with browsers.screen(browser, width, 900, scheme):
        browsers.show(browser, written)
        page = browsers.findings(browser)
        browser.execute_script("document.querySelector('#list button').click()")
        dialog = browsers.findings(browser)
    assert [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in page + dialog] == []


def test_axe_core_does_look(browser, written):
    if not browsers.AXE.is_file():
        pytest.skip(f"needs axe-core at {browsers.AXE}: make axe, or set MGLL_AXE")
    with browsers.screen(browser, WIDE, 900):
        browsers.show(browser, written)
        browser.execute_script("document.querySelector('.headline').style.color = '#999'")
        assert [(one["id"], one["impact"]) for one in browsers.findings(browser)] == [
            ("color-contrast", "serious")
        ]
