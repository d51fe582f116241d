"""Writes the tables of docs/clients.md: what each client makes of our results.

``python -m tests.clients.matrix [NAME ...]`` writes the tables of these modules, or of all. A module
``tests/clients/test_NAME.py`` has a function ``table`` that returns Markdown; the page has the lines
``<!-- tests.clients.test_NAME -->`` and ``<!-- end -->`` around it.
"""

import importlib
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
END = "<!-- end -->"


def replaced(page: str, module: str, table: str) -> str:
    """Return the page with another table between a module's marks."""
    block = re.compile(rf"(<!-- {re.escape(module)} -->\n).*?({END})", re.DOTALL)
    page, found = block.subn(lambda marks: f"{marks[1]}\n{table.strip()}\n\n{marks[2]}", page)
    if found != 1:
        sys.exit(f"{PAGE}: <!-- {module} --> and {END} stand there {found} times, expected once")
    return page


def write(names: list[str]) -> None:
    """Write the tables of modules of this folder into the page."""
    all_names = [path.stem.removeprefix("test_") for path in sorted(Path(__file__).parent.glob("test_*.py"))]
    for name in names or all_names:
        module = importlib.import_module(f"tests.clients.test_{name}")
        PAGE.write_text(replaced(PAGE.read_text("utf-8"), module.__name__, module.table()), "utf-8")


if __name__ == "__main__":
    write(sys.argv[1:])
