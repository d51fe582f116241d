"""The pictures of the documents, from the outputs of `make demo` (`make screenshots`).

    python -m tests.screenshots demo

All show phantom photographs, which are drawn: no patient, no license.
"""

import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import mgll_encoder
from tests import browser as browsers
from tests.environments import ROOT

DOCS = ROOT / "docs"
DENSITY = 1.25
"""Device pixels per pixel of the page."""

WIDE, NARROW, HEIGHT, GAP = 1280, 390, 780, 16


def main(demo: Path) -> None:
    """Replace docs/report.png, docs/explain.png and docs/phantom.jpg."""
    demo = demo.resolve()
    if reason := browsers.missing():
        sys.exit(f"error: {reason}")
    with browsers.opened() as driver:
        _saved(report(driver, demo / "report.html"), DOCS / "report.png")
    explain(demo, DOCS / "explain.png")
    with Image.open(demo / "phantom" / "contact_sheet.png") as sheet:
        sheet.convert("RGB").save(DOCS / "phantom.jpg", quality=85, optimize=True)


def report(driver: Any, page: Path) -> Image.Image:
    """The report: its table on a wide screen, a question that the new tower has put right, a telephone in the dark."""
    with browsers.screen(driver, WIDE, HEIGHT, density=DENSITY):
        browsers.show(driver, page)
        table = _shot(driver)
        driver.execute_script(
            "const field = document.getElementById('filters').elements.flip; field.value = [...field.options]"
            ".find(one => one.value.startsWith('fixed') && one.text.includes('to mgll:')).value;"
            "field.dispatchEvent(new Event('input', {bubbles: true}));"
            "document.getElementById('questions').scrollIntoView();"
            "document.querySelector('#list button').click()"
        )
        driver.execute_async_script(
            "const done = arguments[0]; Promise.all([...document.querySelectorAll('dialog img')]"
            ".map(image => image.decode())).then(() => requestAnimationFrame(done))"
        )
        question = _shot(driver)
    with browsers.screen(driver, NARROW, 2 * HEIGHT + GAP, "dark", DENSITY):
        browsers.show(driver, page)
        telephone = _shot(driver)
    return _beside([_below([table, question]), telephone])


def explain(demo: Path, out: Path) -> None:
    """The tower's maps on test images, with their true labels."""
    phantom = demo / "phantom"
    with tempfile.TemporaryDirectory() as folder:
        sheet = Path(folder) / "look.png"
        mgll_encoder.explain(
            demo / "towers" / "mgll", phantom, sheet, targets=["glaucoma", "cataract"], limit=3,
            labels=phantom / "labels.csv", patient_column="patient_or_source_id",
        )  # fmt: skip
        with Image.open(sheet) as image:
            _saved(image, out)


def _shot(driver: Any) -> Image.Image:
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


def _below(images: Sequence[Image.Image]) -> Image.Image:
    gap = round(GAP * DENSITY)
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (max(image.width for image in images), height), "silver")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height + gap
    return sheet


def _beside(images: Sequence[Image.Image]) -> Image.Image:
    turned = [image.transpose(Image.Transpose.TRANSPOSE) for image in images]
    return _below(turned).transpose(Image.Transpose.TRANSPOSE)


def _saved(image: Image.Image, out: Path) -> None:
    """Save with at most 256 colors, which makes the file a third as large."""
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)
    print(f"{out.relative_to(ROOT)}: {out.stat().st_size / 1e3:.0f} kB")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
