"""A browser without a window, for pages of this project: Debian's chromium through selenium, and axe-core in it."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AXE = Path(os.environ.get("MGLL_AXE") or Path(sys.prefix) / "axe" / "axe_playwright_python" / "axe.min.js")
"""axe-core (Deque, MPL 2.0): `make axe` fetches it, ``MGLL_AXE`` names another copy."""

ARGUMENTS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "hide-scrollbars",
    "disable-background-networking", "disable-component-update", "window-size=1200,900",
)  # fmt: skip


def missing() -> str:
    """What is missing for a browser, empty if nothing is."""
    programs = shutil.which("chromium") and shutil.which("chromedriver")
    return "" if programs else "needs Debian's packages chromium and chromium-driver"


@contextmanager
def opened() -> Iterator[Any]:
    """Start the browser, and close it at the end."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ARGUMENTS:
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def screen(driver: Any, width: int, height: int, scheme: str = "light", density: float = 1) -> Iterator[None]:
    """Show pages on a screen of this size; below 500 pixels it is a telephone's."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": density, "mobile": width < 500},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def show(driver: Any, page: Path) -> None:
    """Open a page anew, also if only the part after its # differs from the one shown."""
    driver.get("about:blank")
    driver.get(page.as_uri())


def findings(driver: Any) -> list[Mapping[str, Any]]:
    """Return what axe-core finds wrong with the page shown: ``id``, ``impact``, ``nodes`` ..."""
    driver.execute_script(AXE.read_text(encoding="utf-8"))
    found: dict[str, Any] = driver.execute_async_script(
        "const done = arguments[0]; axe.run(document).then(done, error => done({error: String(error)}))"
    )
    if "error" in found:
        raise RuntimeError(found["error"])
    if len(found["passes"]) < 10:
        raise RuntimeError(f"axe-core has checked next to nothing: {len(found['passes'])} rules passed")
    return list(found["violations"])
