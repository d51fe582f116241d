"""Progress of what takes long: nothing is shown unless a program says how; the commands show bars."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

Tracker = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""Iterates under a progress bar: items, what is done with them, how many there are if they do not say it."""

_trackers: list[Tracker] = []


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate, and show progress where `show_with` said how."""
    return iter(_trackers[-1](items, description, total) if _trackers else items)


def show_with(tracker: Tracker | None) -> None:
    """Show progress with this from now on, in the whole process; None shows none.

    Example:
        >>> from tqdm import tqdm
        >>> show_with(lambda items, description, total: tqdm(items, description, total))
        >>> show_with(None)
    """
    _trackers[:] = [tracker] if tracker else []
