"""Counting how often files are opened, by an audit hook: what Python opens, not what libraries in Rust or C++ do."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_counting: list[tuple[str, Counter[str]]] = []
"""Folders under watch, with their counts. A hook cannot be removed: without any it does nothing."""


def _count(event: str, arguments: tuple[object, ...]) -> None:
    if event != "open" or not _counting or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    path = os.path.realpath(os.fsdecode(arguments[0]))
    for folder, counts in _counting:
        if path.startswith(folder):
            counts[path.removeprefix(folder)] += 1


sys.addaudithook(_count)


@contextmanager
def opens_below(folder: Path) -> Iterator[Counter[str]]:
    """Count the opens of every file below a folder, in this process: path relative to the folder -> number."""
    watched = (f"{folder.resolve()}{os.sep}", Counter[str]())
    _counting.append(watched)
    try:
        yield watched[1]
    finally:
        _counting.remove(watched)
