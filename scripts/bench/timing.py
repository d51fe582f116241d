"""Timing shared by the benchmarks: variants that run in turn, and the spread of their figures."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, TypeVar

from mgll_encoder.common.progress import track

T = TypeVar("T")


class Spread(NamedTuple):
    """Median of some figures, the least and the greatest of them."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return the spread of at least one figure."""
        known = list(values)
        return cls(median(known), min(known), max(known))

    def text(self, digits: int = 2) -> str:
        """Return it as ``median [least, most]``."""
        middle, least, most = (f"{value:.{digits}f}" for value in self)
        return f"{middle} [{least}, {most}]"


@dataclass(frozen=True)
class Seconds:
    """Time by the wall clock, and processor time."""

    wall: float
    cpu: float

    def __add__(self, other: "Seconds") -> "Seconds":
        """Sum of both times."""
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


class Stopwatch:
    """Reads both clocks; runs from its creation."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> Seconds:
        """Return the times since its creation."""
        return Seconds(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def seconds_of(
    run: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], object] = int,
) -> float:
    """Run once and return the seconds that it took.

    Args:
        run: What is timed.
        clock: Returns seconds.
        wait: Called before and after, such as ``torch.cuda.synchronize``.
    """
    wait()
    start = clock()
    run()
    wait()
    return clock() - start


def interleaved(
    variants: Mapping[str, Callable[[], T]], repeats: int, rehearsals: int = 0
) -> dict[str, list[T]]:
    """Run all variants in turn, several times over, so that a slow minute of the machine hits all of them.

    Args:
        variants: Name -> a function that measures itself and returns its figure.
        repeats: Rounds that count.
        rehearsals: Rounds before them that do not.

    Returns:
        Name -> figures, round by round.
    """
    found: dict[str, list[T]] = {name: [] for name in variants}
    for turn in track(range(rehearsals + repeats), "Rounds"):
        for name, variant in variants.items():
            figure = variant()
            if turn >= rehearsals:
                found[name].append(figure)
    return found


def paired_ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the spread of ratios round by round."""
    return Spread.of(a / b for a, b in zip(above, below, strict=True))
