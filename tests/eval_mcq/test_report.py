"""eval-mcq report in a real browser."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from eval_mcq.html_report import ReportOptions, write_report
from eval_mcq.items.schema import load_bench
from eval_mcq.records.run_record import load_run
from tests.browser import show
from tests.eval_mcq.helpers import run_of_bench, save_run, small_bench

QUESTIONS = 150
ANSWERS = {"base": 3, "mgll": 4}
"""Arm -> every which question it answers wrongly."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    """A folder with a bench of pictures and the runs of two arms that differ in some answers."""
    folder = tmp_path_factory.mktemp("asked")
    bench = load_bench(small_bench(folder, 10))
    lines = bench.path.read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    many = [
        row | {"id": f"{row['id']}-{n}", "tags": ["</script><b>"] if n == 0 else []}
        for n in range(QUESTIONS // len(rows))
        for row in rows
    ]
    bench.path.write_text("\n".join([lines[0], *map(json.dumps, many)]) + "\n")
    for arm, every in ANSWERS.items():
        answered = run_of_bench(load_bench(bench.path), lambda number, every=every: number % every == 0)
        save_run(answered, folder / arm)
    return folder


def arms(folder: Path) -> list[str]:
    return [f"{name}={folder / name}" for name in ANSWERS]


@pytest.fixture(scope="module")
def written(asked, tmp_path_factory) -> Path:
    """The page of the two arms."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    runs = {name: load_run(asked / name) for name in ANSWERS}
    write_report(runs, load_bench(asked / "bench.jsonl"), out, ReportOptions())
    return out


@pytest.fixture
def page(browser, written):
    """The page, opened."""
    show(browser, written)
    return browser


def shown(page) -> str:
    return page.execute_script("return document.getElementById('count').textContent")


def choose(page, name: str, value: str) -> str:
    page.execute_script(
        "const field = document.getElementById('filters').elements[arguments[0]];"
        "field.value = arguments[1]; field.dispatchEvent(new Event('input', {bubbles: true}))",
        name, value,
    )  # fmt: skip
    return shown(page)


def test_the_page_draws_table_plots_and_questions_without_a_console_error(page):
    assert len(page.find_elements("css selector", "#plots svg")) == 5
    assert "Average" in page.find_element("id", "table").text
    assert shown(page).startswith(f"{QUESTIONS} of {QUESTIONS} questions; base 100 right, mgll 112 right")
    loaded = page.execute_script(
        "return [...document.images].slice(0, 3).map(i => i.decode().then(() => i.naturalWidth))"
    )
    assert len(loaded) == 3
    assert page.get_log("browser") == []


def test_filters_find_what_the_swap_has_flipped(page):
    fixed = sum(n % 3 == 0 and n % 4 != 0 for n in range(QUESTIONS))
    broken = sum(n % 3 != 0 and n % 4 == 0 for n in range(QUESTIONS))
    assert choose(page, "flip", "fixed:1").startswith(f"{fixed} of")
    assert choose(page, "flip", "broken:1").startswith(f"{broken} of")
    choose(page, "flip", "")
    assert choose(page, "category", "AMD").startswith("75 of")
    both_wrong = sum(n % 12 == 0 for n in range(0, QUESTIONS, 2))
    choose(page, "arm-0", "wrong")
    assert choose(page, "arm-1", "wrong").startswith(f"{both_wrong} of")
    page.find_element("css selector", "#filters button[type=reset]").click()
    assert choose(page, "text", "q7-11").startswith("1 of")


def test_filters_are_in_the_address_so_that_a_view_can_be_shared(page):
    choose(page, "flip", "fixed:1")
    address, count = page.current_url, shown(page)
    page.get("about:blank")
    page.get(address)
    assert shown(page) == count


def test_questions_are_opened_and_walked_with_the_keyboard(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        ActionChains(page).send_keys(*keys).perform()

    page.execute_script("document.querySelector('#list button').focus()")
    press(Keys.ARROW_RIGHT, Keys.ENTER)
    dialog = page.find_element("id", "detail")
    assert "Cataract (2 of 150)" in dialog.text
    assert "70.0 %" in dialog.text
    press(Keys.ARROW_RIGHT)
    assert "(3 of 150)" in dialog.text
    press(Keys.ESCAPE)
    assert not dialog.is_displayed()
    press("/")
    assert page.switch_to.active_element.get_attribute("name") == "text"


def test_scrolling_brings_the_other_questions(page):
    before = len(page.find_elements("css selector", "#list li"))
    assert before < QUESTIONS
    page.set_script_timeout(60)
    after = page.execute_async_script(
        "const done = arguments[0], list = document.getElementById('list');"
        "const step = () => { document.getElementById('more').scrollIntoView();"
        f"list.childElementCount < {QUESTIONS} ? setTimeout(step, 20) : done(list.childElementCount) }};step()"
    )
    assert after == QUESTIONS


def test_a_window_that_shows_all_of_the_list_is_filled_without_scrolling(page):
    """The end of the list stays in view, so that no scroll event occurs."""
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 3000, "height": 60_000, "deviceScaleFactor": 0.1, "mobile": False},
    )
    page.refresh()
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(page, 60).until(
        lambda page: (
            page.execute_script("return document.getElementById('list').childElementCount") == QUESTIONS
        )
    )
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_both_color_schemes(page, scheme):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    style = page.execute_script(
        "const s = getComputedStyle(document.documentElement);"
        "return Object.fromEntries(arguments[0].map(name => [name, s.getPropertyValue('--' + name)]))",
        ["page", "card", "ink", "soft", "link", "good", "bad"],
    )
    for text in ("ink", "soft", "link", "good", "bad"):
        for ground in ("page", "card"):
            assert contrast(style[text], style[ground]) >= 4.5, (text, ground)


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colors."""

    def luminance(color: str) -> float:
        parts = [int(color.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_page_refers_to_nothing_outside_and_names_no_local_folder(asked, tmp_path, eval_mcq):
    assert eval_mcq("report", *arms(asked), "--out", tmp_path / "report.html") == 0
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text) == []
    assert "url(http" not in text
    assert str(asked) not in html.unescape(text)
    assert "</script><b>" not in text
    assert "MB, 10 thumbnails inside" in eval_mcq.out


def test_thumbnails_can_lie_in_a_folder_and_plots_become_files(asked, tmp_path, eval_mcq):
    page, assets, plots = tmp_path / "report.html", tmp_path / "thumbs", tmp_path / "plots"
    assert eval_mcq("report", *arms(asked), "--out", page, "--assets", assets, "--plots", plots) == 0
    assert len(list(assets.iterdir())) == 10
    assert all(f"thumbs/{file.name}" in page.read_text() for file in assets.iterdir())
    names = {"accuracy", "dots", "reliability", "confusion-base", "confusion-mgll"}
    assert {file.name for file in plots.iterdir()} == {
        f"{n}.{kind}" for n in names for kind in ("png", "svg")
    }
    assert Image.open(plots / "accuracy.png").width > 800
    again = tmp_path / "again.html"
    assert eval_mcq("report", *arms(asked), "--out", again, "--assets", tmp_path / "thumbs", "--force") == 0
    assert again.read_bytes() == page.read_bytes()


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(asked, tmp_path, eval_mcq):
    page = tmp_path / "report.html"
    folder = tmp_path / "copy"
    shutil.copytree(asked, folder)
    bench = folder / "bench.jsonl"
    refuses = eval_mcq.refuses
    assert "--bench" in refuses(
        "report", *arms(asked), "--out", page, "--bench", small_bench(tmp_path / "other", 4)
    )
    Image.new("RGB", (8, 8)).save(folder / "3.png")
    error = refuses("report", *arms(folder), "--out", page, "--bench", bench)
    assert "3.png of question 'q3-0' has changed" in error
    (folder / "3.png").unlink()
    error = refuses("report", *arms(folder), "--out", page, "--bench", bench)
    assert "3.png of question 'q3-0' does not exist" in error
    assert "not below" in refuses(
        "report", *arms(asked), "--out", page, "--assets", tmp_path.parent / "thumbs"
    )
    assert "two arms" in refuses("report", f"a={asked / 'base'}", f"a={asked / 'mgll'}", "--out", page)
    assert not page.exists()
    assert eval_mcq("report", *arms(folder), "--out", page, "--bench", bench, "--no-thumbnails") == 0
    assert "exists" in refuses("report", *arms(asked), "--out", page)
