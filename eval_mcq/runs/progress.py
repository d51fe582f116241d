"""Progress of a run: rows done, rows per second, time left."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mgll_encoder.common.progress import counter

_logger = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two log lines if no bar is shown."""


@contextmanager
def rate(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress within the block; yields a function to call with the number of rows just completed.

    Shows a bar if the program shows bars; otherwise logs a line every half minute.
    """
    if bar := counter():
        with bar(description, total) as step:
            yield step
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
