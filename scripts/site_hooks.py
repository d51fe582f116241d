"""What the documentation's site is made of besides docs/: pages of the project's root, and the examples.

MkDocs calls these functions (`hooks` in mkdocs.yml). Links that lead out of docs/ are rewritten: to the page that the
target has on the site, else to plain text, because the place of the repository is not known here.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File of the project -> page of the site."""

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]+)?\)")
CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show pages that mkdocs.yml does not name under a heading of their own, so that none is lost."""
    folder = Path(config.docs_dir)
    pages = {file.relative_to(folder).as_posix() for file in folder.rglob("*.md")}
    if others := sorted(pages - set(places(config.nav))):
        config.nav = [*(config.nav or []), {"More": others}]
    return config


def places(nav: Any) -> list[str]:
    """Return the pages of a part of the navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav or ()) for page in places(part)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for source, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for example in sorted((ROOT / "examples").glob("*.py")):
        text = as_markdown(example.name, example.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"examples/{example.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Rewrite the links of a page that lead out of docs/."""
    source = page.file.src_uri
    written_in = next((path for path, uri in FROM_ROOT.items() if uri == source), f"docs/{source}")
    here = posixpath.dirname(written_in)

    def rewritten(link: re.Match[str]) -> str:
        words, target, anchor = link[1], link[2], link[3] or ""
        inside = posixpath.normpath(posixpath.join(here, target))
        uri = FROM_ROOT.get(inside, inside.removeprefix("docs/"))
        if files.get_file_from_path(uri) and (inside in FROM_ROOT or inside.startswith("docs/")):
            return f"[{words}]({posixpath.relpath(uri, posixpath.dirname(source) or '.')}{anchor})"
        return words if inside in words else f"{words} (`{inside}`)"

    return LINK.sub(rewritten, markdown)


def as_markdown(name: str, code: str) -> str:
    """Return an example as a page: `# %% [markdown]` cells as text, the others as code."""
    lines = ["<!-- written by scripts/site_hooks.py -->"]
    head, *cells = CELL.split(code)
    assert not head.strip() or head.startswith('"""'), f"examples/{name} begins with code outside a cell"
    for kind, cell in zip(cells[::2], cells[1::2], strict=True):
        if kind.strip() == "[markdown]":
            lines.append("\n".join(re.sub(r"^# ?", "", line) for line in cell.strip().splitlines()))
        else:
            lines.append(f"```python\n{cell.strip()}\n```")
    lines.append(f"This page is the file `examples/{name}`: `python examples/{name}` runs it.")
    return "\n\n".join(lines) + "\n"
