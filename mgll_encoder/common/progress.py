"""Progress of long operations. Nothing is shown by default; the commands show bars."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

Tracker = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""Iterates under a progress bar; arguments: items, description, number of items if they have no length."""

_trackers: list[Tracker] = []


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate, showing progress with the tracker set by `show_with`."""
    return iter(_trackers[-1](items, description, total) if _trackers else items)


def show_with(tracker: Tracker | None) -> None:
    """Set the tracker that shows progress in the whole process; None shows nothing.

    Example:
        >>> from tqdm import tqdm
        >>> show_with(lambda items, description, total: tqdm(items, description, total))
        >>> show_with(None)
    """
    _trackers[:] = [tracker] if tracker else []
