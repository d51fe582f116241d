"""The site has a place for every page, shows the whole interface, and reads as on GitHub; `make docs` builds it."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documents import CODE
from tests.environments import ROOT

SITE = ROOT / "mkdocs.yml"
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
DOCS = ROOT / "docs"


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name functions of the site's own packages."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def places(nav: Any) -> list[str]:
    """The pages of a part of the navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in places(part)]


def test_the_navigation_names_pages_that_exist_once() -> None:
    """A page that it does not name is shown under "More" (scripts/site_hooks.py)."""
    named = places(yaml.load(SITE.read_text(encoding="utf-8"), _Loader)["nav"])
    pages = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")}
    pages |= {f"examples/{file.stem}.md" for file in (ROOT / "examples").glob("*.py")}
    assert len(named) == len(set(named))
    assert set(named) <= pages | set(ELSEWHERE)


@pytest.mark.parametrize("package", ["mgll_encoder", "mllm_adapters", "eval_mcq"])
def test_the_reference_shows_every_public_name(package: str) -> None:
    shown = re.findall(rf"^::: {package}\.(\w+)$", (DOCS / "api" / f"{package}.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(importlib.import_module(package).__all__)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_lists_begin_after_an_empty_line(page: Path) -> None:
    """GitHub begins a list anywhere; Python-Markdown, which makes the site, only there."""
    text = CODE.sub("\n", page.read_text(encoding="utf-8"))
    for before, line in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if re.match(r"(?:[*-]|\d+\.) ", line):
            assert not before or re.match(r"(?:[*-]|\d+\.) | +\S|<!--", before), line


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
