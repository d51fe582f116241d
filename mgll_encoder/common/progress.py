"""Progress of long operations: a log line now and then; the commands show bars instead if there is a terminal."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.filesize import decimal

T = TypeVar("T")

_logger = logging.getLogger(__name__)

Tracker = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""Iterates under a progress bar; arguments: items, description, number of items if they have no length."""

Counter = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress bar that advances by several at a time; arguments: description, total."""

SHORTEST, LONGEST = 30.0, 600.0
"""Seconds between two lines: a twentieth of the time spent so far, within these limits."""


@dataclass
class _Display:
    tracker: Tracker | None = None
    counter: Counter | None = None
    byte_counter: Counter | None = None


_display = _Display()


class Pace:
    """Tells in lines how far a long operation is, and what is left: ``training: 120 of 450 steps, 3 min left``.

    Args:
        description: What is done.
        total: How much; None if that is not known.
        unit: Of what.
        show: Formats a number.
        say: Prints a line; a log record by default.
        clock: Returns the seconds; for tests.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        unit: str = "",
        show: Callable[[int], str] = "{:,}".format,
        say: Callable[[str], None] = _logger.info,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.total, self.say = description, total, say
        self._unit, self._show, self._clock = unit and f" {unit}", show, clock
        self._done, self._start = 0, clock()
        self._next = self._start + SHORTEST
        say(f"{description} ..." if total is None else f"{description} ({show(total)}{self._unit}) ...")

    def advance(self, done: int = 1, about: str = "") -> None:
        """Count what has just been done, and say how far it is if it is time to.

        Args:
            done: Number of items.
            about: What else the line says, such as the loss.
        """
        self._done += done
        now = self._clock()
        if now < self._next or self._done == self.total:
            return
        spent = now - self._start
        self._next = now + min(max(spent / 20, SHORTEST), LONGEST)
        if self.total is None:
            parts = [f"{self._show(self._done)}{self._unit} so far", about, _duration(spent)]
        else:
            left = spent * (self.total - self._done) / max(self._done, 1)
            sofar = f"{self._show(self._done)} of {self._show(self.total)}{self._unit}"
            parts = [sofar, about, f"{_duration(left)} left"]
        self.say(f"{self.description}: {', '.join(filter(None, parts))}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate, showing progress with the tracker set by `show_with`, or else in log lines."""
    if _display.tracker:
        yield from _display.tracker(items, description, total)
        return
    pace = Pace(description, len(items) if total is None and isinstance(items, Sized) else total)
    for item in items:
        yield item
        pace.advance()


@contextmanager
def counting(description: str, total: int, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts, shown with the counter set by `show_with`, or else in log lines."""
    shown = _display.byte_counter if in_bytes else _display.counter
    if shown:
        with shown(description, total) as advance:
            yield advance
    else:
        yield Pace(description, total, show=decimal if in_bytes else "{:,}".format).advance


@contextmanager
def saying_what_is_kept(kept: Callable[[], str]) -> Iterator[None]:
    """Log what remains of an operation if Ctrl-C or a signal ends it, and how it continues.

    Args:
        kept: Returns the line.
    """
    try:
        yield
    except KeyboardInterrupt:
        _logger.info(kept())
        raise


def counter() -> Counter | None:
    """Return the counter set by `show_with`; if there is one, other libraries show their bars, too."""
    return _display.counter


def show_with(
    tracker: Tracker | None, counter: Counter | None = None, byte_counter: Counter | None = None
) -> None:
    """Set what shows progress in the whole process; with None it is told in log lines, of level INFO.

    Args:
        tracker: Shows an iteration.
        counter: Shows a bar that is advanced by hand. It also turns on the bars of transformers and datasets, so pass
            one only for a terminal.
        byte_counter: Likewise for bytes that are written or compared; it turns on nothing else.

    Example:
        >>> from tqdm import tqdm
        >>> show_with(lambda items, description, total: tqdm(items, description, total))
        >>> show_with(None)
    """
    _display.tracker, _display.counter, _display.byte_counter = tracker, counter, byte_counter
