"""Runs the tests of the clients, and writes the tables of docs/clients.md: what each client makes of our results.

``python -m tests.clients.matrix [NAME ...]`` does so for the modules ``tests/clients/test_NAME.py``, or for all; a
table is written if its module's tests pass, from what they have measured. It comes from the module's function
``table`` and stands between the lines ``<!-- tests.clients.test_NAME -->`` and ``<!-- end -->``. A function ``example``
writes another one, between ``<!-- tests.clients.test_NAME.example -->`` and ``<!-- end -->`` on any page of docs/.
"""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
END = "<!-- end -->"


def write_block(mark: str, text: str) -> None:
    """Put a text between a mark and the next end, on the one page that has the mark."""
    block = re.compile(rf"(<!-- {re.escape(mark)} -->\n).*?({END})", re.DOTALL)
    pages = [page for page in DOCS.glob("*.md") if block.search(page.read_text("utf-8"))]
    if len(pages) != 1:
        sys.exit(f"{DOCS}: {len(pages)} pages have <!-- {mark} --> and {END}, expected one")
    written = block.sub(
        lambda marks: f"{marks[1]}\n{text.strip()}\n\n{marks[2]}", pages[0].read_text("utf-8")
    )
    pages[0].write_text(written, "utf-8")


def write_tables(module: ModuleType) -> None:
    """Write what a module has measured."""
    write_block(module.__name__, module.table())
    if hasattr(module, "example"):
        write_block(f"{module.__name__}.example", module.example())


def main(names: list[str]) -> None:
    """Run the tests of modules of this folder and write their tables."""
    failed = []
    for name in names or [path.stem.removeprefix("test_") for path in sorted(HERE.glob("test_*.py"))]:
        if pytest.main(["-m", "", str(HERE / f"test_{name}.py")]):
            failed.append(name)
        else:  # the module that pytest has imported
            write_tables(importlib.import_module(f"tests.clients.test_{name}"))
    if failed:
        sys.exit(f"failed, so their tables are as they were: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
