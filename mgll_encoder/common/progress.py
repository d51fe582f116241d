"""Progress of long operations. Nothing is shown by default; the commands show bars."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

Tracker = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""Iterates under a progress bar; arguments: items, description, number of items if they have no length."""

Counter = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress bar that advances by several at a time; arguments: description, total."""


@dataclass
class _Display:
    tracker: Tracker | None = None
    counter: Counter | None = None


_display = _Display()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate, showing progress with the tracker set by `show_with`."""
    return iter(_display.tracker(items, description, total) if _display.tracker else items)


def counter() -> Counter | None:
    """Return the counter set by `show_with`; if there is one, other libraries show their bars, too."""
    return _display.counter


@contextmanager
def no_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:  # noqa: ARG001 (of a Counter)
    """Count without showing anything."""
    yield lambda _: None


def show_with(tracker: Tracker | None, counter: Counter | None = None) -> None:
    """Set what shows progress in the whole process; None shows nothing.

    Args:
        tracker: Shows an iteration.
        counter: Shows a bar that is advanced by hand. It also turns on the bars of transformers and datasets, so pass
            one only for a terminal.

    Example:
        >>> from tqdm import tqdm
        >>> show_with(lambda items, description, total: tqdm(items, description, total))
        >>> show_with(None)
    """
    _display.tracker, _display.counter = tracker, counter
