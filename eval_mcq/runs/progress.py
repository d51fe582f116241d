"""Progress of a run: rows done, rows per second, time left."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mgll_encoder.common.cli import stderr

_logger = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two lines where stderr is no terminal."""


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


@contextmanager
def rate(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress within; yields a function to call with the number of rows that were done.

    On a terminal a bar with speed and time left; elsewhere a line every half minute.
    """
    if stderr.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=stderr, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda done: bar.advance(task, done)
        return
    _logger.info(f"{description} ({total}) ...")
    start = said = time.monotonic()
    sofar = 0

    def advance(done: int) -> None:
        nonlocal sofar, said
        sofar += done
        now = time.monotonic()
        if now - said >= EVERY:
            said = now
            speed = sofar / (now - start)
            _logger.info(f"{sofar}/{total}, {speed:.1f}/s, {(total - sofar) / speed / 60:.0f} min left")

    yield advance
